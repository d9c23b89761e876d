"""How names of files with clips end. Nothing is imported, so the command line may ask at once."""

ANIMATIONS = (".gif", ".webp")
"""May also hold a picture."""

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".m4v", ".avi")

CLIPS = ANIMATIONS + VIDEOS
"""What a clip is written as; to read, there are more."""
