// The endpoint's routes. Failures become sentences.

// The key lives in this variable alone. Session storage would survive a reload, but browsers write it to disk.
let key = null;
let release = -1; // the newest one that any answer named

class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}

const OTHERWISE = {
  missing_scope: "Ask whoever runs the endpoint for a key that has it; the rest of the console works without.",
  keys_unreadable: "Nobody can enter until it can.",
};

async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers }, mine = key;
  if (key !== null) sent.authorization = `Bearer ${key}`;
  if (body !== undefined) sent["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, body: JSON.stringify(body), headers: sent, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "unreachable", "The endpoint does not answer.");
  }
  if (!response.ok) {
    const error = await refused(response);
    // Several requests may learn it at once, and some when another key has been entered meanwhile.
    if (error.status === 401 && key === mine && $("door").hidden) closeDoor(error);
    throw error;
  }
  const named = Number(response.headers.get("x-wiseline-release"));
  if (named > release) {
    release = named;
    document.dispatchEvent(new Event("release"));
  }
  return response;
}

async function refused(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {} // not ours: a proxy's page, say
  const message = error.message ?? `The endpoint answered ${response.status}.`;
  return new Refused(response.status, error.code, [message, OTHERWISE[error.code]].filter(Boolean).join(" "));
}

async function call(path, options) {
  return (await request(path, options)).json();
}

// The server-sent events of one answer. An error half-way is an event too.
async function* events(response) {
  let unread = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const lines = (unread + piece.value).split("\n");
    unread = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Refused(response.status, event.error.code, event.error.message);
      yield event;
    }
  }
}

function closeDoor({ code, message }) {
  key = null;
  $("inside").hidden = true;
  $("door").hidden = false;
  $("door-why").textContent = code === "missing_api_key" ? "" : message;
  $("key").value = "";
  $("key").focus();
}

function openDoor() {
  $("door").hidden = true;
  $("door-why").textContent = ""; // the same words, said again, are heard again
  $("inside").hidden = false;
}
