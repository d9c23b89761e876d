"""An HTTP server in the forms that clients already send, with a page; needs the extra `serve`.

Shapes do not occur here: pictures are PIL's, and everything else is in `emu3.pipeline`.
"""
