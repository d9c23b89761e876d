"""Contact sheets: pictures side by side, small ones enlarged, each above its caption."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Pixels of a side: smaller pictures are enlarged by whole numbers up to it, larger ones are shown in twice as many.
SIDE = 192
MARGIN = 8
CAPTION_SIZE = 12
CAPTION_HEIGHT = 36


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int = 3,
    right: Sequence[bool] | None = None,
) -> Image.Image:
    """Pictures in rows, `columns` in each. Where `right` is given, captions are green for right, red for wrong."""
    shown = [_resized(picture) for picture in pictures]
    width, height = max(picture.width for picture in shown), max(picture.height for picture in shown)
    cell_width, cell_height = width + MARGIN, height + MARGIN + (CAPTION_HEIGHT if captions else 0)
    columns = min(columns, len(shown))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(CAPTION_SIZE)
    for index, (picture, caption) in enumerate(zip(shown, captions or [""] * len(shown), strict=True)):
        left = MARGIN + index % columns * cell_width
        top = MARGIN + index // columns * cell_height
        sheet.paste(picture, (left, top))
        color = "black" if right is None else "green" if right[index] else "red"
        pen.text((left, top + height + 4), _wrap(caption, font, width), fill=color, font=font, spacing=2)
    return sheet


def _resized(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest <= SIDE:
        return picture.resize([side * (SIDE // longest) for side in picture.size], Image.Resampling.NEAREST)
    smaller = picture.copy()
    smaller.thumbnail((2 * SIDE, 2 * SIDE))
    return smaller


def _wrap(caption: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The caption in lines of at most `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in caption.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
