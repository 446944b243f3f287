// One request: sent, stopped, read; as a whole, or token by token.

// What the server refused, in its words.
export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function refusal(response) {
  const text = await response.text();
  let told = text;
  try {
    const { error } = JSON.parse(text);
    told = typeof error === "string" ? error : text;
  } catch {
    // Something on the way answered, not the endpoint.
    told = text.slice(0, 500) || response.statusText;
  }
  return new Refused(response.status, told, response.headers.get("retry-after"));
}

// What an answer's headers say: version, tokens that were read, and milliseconds by part.
function headersOf(headers) {
  const parts = (headers.get("server-timing") || "").split(",").map((part) => part.trim().split(";dur="));
  const times = parts.filter(([, time]) => time !== undefined).map(([name, time]) => [name, Number(time)]);
  return {
    version: headers.get("x-model-version"),
    tokens: headers.get("x-tokens"),
    times: Object.fromEntries(times),
  };
}

// The events of a stream: what stands behind "data:", parsed.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (left + value).split("\n\n");
    left = blocks.pop();
    for (const block of blocks) {
      const data = block.startsWith("data:") ? block.slice(5).trim() : "[DONE]";
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function streamed(response, began, tell) {
  const found = { ...headersOf(response.headers), text: "", written: 0, first: null, whole: false };
  for await (const event of eventsOf(response.body)) {
    if (event.error) throw new Refused(response.status, event.error, null);
    found.written += 1;
    found.first ??= performance.now() - began;
    if (!event.token.special) found.text += event.token.text;
    if (event.generated_text !== null) found.text = event.generated_text;
    found.whole = event.generated_text !== null;
    found.all = performance.now() - began;
    tell(found);
  }
  if (!found.whole) throw new Error("The stream ended before its last token.");
  return found;
}

// The answer to `request` at `address`: its body, or, of a stream, its text, which `tell` is told of token by token.
// Raises Refused; AbortError once `signal` is aborted.
export async function asked(address, request, signal, tell) {
  const began = performance.now();
  const response = await fetch(address, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  if (request.stream) return streamed(response, began, tell);
  return { ...headersOf(response.headers), body: await response.json() };
}
