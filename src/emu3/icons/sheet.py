"""Contact sheets: many small pictures side by side, enlarged, each above its caption."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SCALE = 4
MARGIN = 8
CAPTION_SIZE = 12
CAPTION_HEIGHT = 36


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 3, right: Sequence[bool] | None = None
) -> Image.Image:
    """Pictures in rows, `columns` in each. Where `right` is given, captions are green for right, red for wrong."""
    width = max(picture.width for picture in pictures) * SCALE
    height = max(picture.height for picture in pictures) * SCALE
    cell_width, cell_height = width + MARGIN, height + CAPTION_HEIGHT + MARGIN
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(CAPTION_SIZE)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = MARGIN + index % columns * cell_width
        top = MARGIN + index // columns * cell_height
        enlarged = picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        color = "black" if right is None else "green" if right[index] else "red"
        pen.text((left, top + height + 4), _wrap(caption, font, width), fill=color, font=font, spacing=2)
    return sheet


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
