// The device's own API. Every change carries the header that a foreign page cannot send.

const HEADERS = { "Content-Type": "application/json", "X-PeerLLM": "page" };

/** An answer that is an error becomes an Error with the device's own line. */
async function checked(response) {
  if (response.ok) return response;
  let message = `the device answered ${response.status}`;
  try { message = (await response.json()).error.message; } catch { /* keep the plain line */ }
  if (response.status === 401) message = "This page is no longer signed in. Open it again with the link that has the token.";
  throw new Error(message);
}

async function ask(path, options) {
  try {
    return await checked(await fetch(path, options));
  } catch (error) {
    if (error instanceof TypeError) throw new Error("This device does not answer. Is peerllm still running?");
    throw error;
  }
}

export const get = async (path) => (await ask(path, {})).json();

export const post = async (path, body = {}) =>
  (await ask(path, { method: "POST", headers: HEADERS, body: JSON.stringify(body) })).json();

/** The parts of a streamed answer between `separator`s. */
async function* parts(path, body, separator, signal) {
  const response = await ask(path, { method: "POST", headers: HEADERS, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const found = (rest + value).split(separator);
      rest = found.pop();
      yield* found;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Lines of JSON, the last one with "ok"; throws at one that holds an error, and if the last is missing. */
export async function* lines(path, body) {
  for await (const line of parts(path, body, "\n")) {
    const object = JSON.parse(line);
    if (object.error) throw new Error(object.error.message);
    yield object;
    if (object.ok) return;
  }
  throw new Error("The connection to the device broke.");
}

/** A chat's chunks, and {comment} for what keeps the line alive; throws at an error event and at a silent end. */
export async function* chat(body, signal) {
  for await (const part of parts("/v1/chat/completions", { ...body, stream: true }, "\n\n", signal)) {
    if (part.startsWith(":")) {
      yield { comment: part.slice(1).trim() };
    } else if (part === "data: [DONE]") {
      return;
    } else {
      const object = JSON.parse(part.slice("data: ".length));
      if (object.error) throw new Error(object.error.message);
      yield object;
    }
  }
  throw new Error("The answer broke off: the connection to the device is gone.");
}
