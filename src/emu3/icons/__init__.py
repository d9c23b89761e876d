"""The icon world that nano learned: captioned scenes drawn by code, unlimited in number and exactly known."""
