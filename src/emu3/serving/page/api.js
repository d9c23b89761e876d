const MOST_TRIES = 20;

export class ApiError extends Error {
  constructor(message, status, wait) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

async function refuse(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // The status alone must do.
  }
  throw new ApiError(message, response.status, Number(response.headers.get("retry-after")) || 2);
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("cancelled", "AbortError"));
    });
  });
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (!response.ok) await refuse(response);
  return response;
}

async function post(path, body, { signal, onbusy } = {}) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await request(path, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify(body),
        signal,
      });
    } catch (error) {
      if (error.status !== 429 || tries === MOST_TRIES) throw error;
      onbusy?.(error.wait);
      await pause(error.wait, signal);
    }
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest = (rest + (done ? "\n\n" : value)).replaceAll("\r\n", "\n");
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        let kind = "message";
        const data = [];
        for (const line of block.split("\n")) {
          if (line.startsWith("event:")) kind = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(5).trim());
        }
        if (data.length) yield { kind, data: data.join("\n") };
      }
      ended = done;
      if (done) return;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost.", 0);
  } finally {
    if (!ended) reader.cancel().catch(() => {});
  }
}

export async function getModel() {
  return (await request("/api/model")).json();
}

async function* stream(path, body, options) {
  for await (const { kind, data } of events(await post(path, body, options))) {
    const content = JSON.parse(data);
    if (kind === "error") throw new ApiError(content.error.message, 500);
    yield { kind, ...content };
  }
}

export const draw = (body, options) => stream("/api/draw", body, options);
export const film = (body, options) => stream("/api/film", body, options);
export const edit = (body, options) => stream("/api/edit", body, options);
export const tell = (body, options) => stream("/api/tell", body, options);

/** The file of a clip that the server keeps. */
export async function clipFile(id, format) {
  return (await request(`/v1/videos/${id}/content?format=${format}`)).blob();
}

export async function score(body, options) {
  return (await (await post("/api/score", body, options)).json()).probabilities;
}

export async function* chat(messages, options) {
  for await (const { data } of events(await post("/v1/chat/completions", { messages, stream: true }, options))) {
    if (data === "[DONE]") continue;
    const content = JSON.parse(data);
    if (content.error) throw new ApiError(content.error.message, 500);
    const delta = content.choices[0]?.delta ?? {};
    yield { text: delta.content ?? "", images: (delta.images ?? []).map((image) => image.image_url.url) };
  }
}
