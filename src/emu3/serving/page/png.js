const KEYWORD = "emu3";
const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const latin1 = (bytes) => new TextDecoder("latin1").decode(bytes);

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function textOf(kind, data) {
  const end = data.indexOf(0);
  if (end < 0 || latin1(data.subarray(0, end)) !== KEYWORD) return null;
  if (kind === "tEXt") return latin1(data.subarray(end + 1));
  if (kind === "zTXt") return latin1(await inflate(data.subarray(end + 2)));
  const packed = data[end + 1] === 1;
  const language = data.indexOf(0, end + 3);
  const text = data.subarray(data.indexOf(0, language + 1) + 1);
  return new TextDecoder().decode(packed ? await inflate(text) : text);
}

/** The settings in a PNG; null where it holds none. */
export async function readSettings(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (!SIGNATURE.every((value, place) => bytes[place] === value)) return null;
  const view = new DataView(bytes.buffer);
  for (let place = 8; place + 12 <= bytes.length; ) {
    const length = view.getUint32(place);
    const kind = latin1(bytes.subarray(place + 4, place + 8));
    if (["tEXt", "zTXt", "iTXt"].includes(kind) && place + 12 + length <= bytes.length) {
      try {
        const text = await textOf(kind, bytes.subarray(place + 8, place + 8 + length));
        const settings = text === null ? null : JSON.parse(text);
        if (settings && typeof settings === "object" && typeof settings.prompt === "string") return settings;
      } catch {
        // A damaged chunk holds no settings.
      }
    }
    place += 12 + length;
  }
  return null;
}

/** The bytes of a data URL. `fetch` may not read one under the page's security policy. */
export function toBlob(url) {
  const comma = url.indexOf(",");
  const head = url.slice(5, comma);
  const body = url.slice(comma + 1);
  const bytes = head.endsWith(";base64")
    ? Uint8Array.from(atob(body), (character) => character.charCodeAt(0))
    : new TextEncoder().encode(decodeURIComponent(body));
  return new Blob([bytes], { type: head.split(";")[0] });
}

export function toUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

export const download = (url, name) => save(toBlob(url), name);

export function save(blob, name) {
  const address = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

export function fileName(record, format = "png") {
  const words = (record.prompt ?? "picture").toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 48);
  return `${words.replace(/^-+|-+$/g, "") || "picture"}-${record.seed ?? 0}.${format}`;
}
