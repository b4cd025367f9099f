// One question, two answers side by side: by the release in use, and by the model as it was before any edit.

let asking = null; // aborts the two streams
let behind = null; // the edit nearest to the question

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask-form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => {
  asking?.abort();
  $("question").focus();
});

async function ask() {
  asking?.abort();
  const mine = (asking = new AbortController());
  const text = $("question").value;
  const chat = $("ask-form").elements.kind.value === "chat";
  const asked = chat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const path = chat ? "/v1/chat/completions" : "/v1/completions";
  $("answers").hidden = false;
  $("why").hidden = true;
  $("stop").hidden = false;
  behind = null;
  announce("Asking.");
  const [edited, unedited] = await Promise.all([
    stream("edited", path, { ...asked, explain: true }, {}, mine.signal),
    stream("unedited", path, asked, { "x-wiseline-route": "off" }, mine.signal),
  ]);
  if (asking !== mine) return; // asked again meanwhile
  $("stop").hidden = true;
  if (mine.signal.aborted) return announce("Stopped.");
  const same = edited === unedited ? "Both are the same." : "They differ.";
  announce(`With edits: ${edited ?? "failed"}. Without edits: ${unedited ?? "failed"}. ${same}`);
  const subject = (behind?.prompt === text && behind.subject) || "";
  $("correct").onclick = () => startEdit({ prompt: text, before: edited ?? "", subject });
}

// Streams one answer into its pane; returns its text, or null where there is none.
async function stream(pane, path, asked, headers, signal) {
  const said = $(`${pane}-said`), meta = $(`${pane}-meta`), began = performance.now();
  said.textContent = "";
  said.classList.remove("wrong");
  said.setAttribute("aria-busy", "true");
  meta.textContent = "…";
  const body = { model: "wiseline", stream: true, stream_options: { include_usage: true }, ...asked };
  let about, tokens = 0;
  if (pane === "edited") $("edited-route").textContent = "";
  try {
    const response = await request(path, { method: "POST", body, headers, signal });
    for await (const chunk of events(response)) {
      if (signal.aborted) break;
      const [choice] = chunk.choices;
      said.append((choice?.delta ? choice.delta.content : choice?.text) ?? "");
      tokens = chunk.usage?.completion_tokens ?? tokens;
      if (chunk.wiseline && !about) {
        about = chunk.wiseline;
        if (pane === "edited") explain(about);
      }
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const by = about ? `release ${about.release}` : "";
    meta.textContent = [pane === "edited" ? by : "", `${tokens} tokens`, `${seconds} s`].filter(Boolean).join(" · ");
    return said.textContent.trim();
  } catch (error) {
    meta.textContent = "";
    if (error.name === "AbortError") {
      meta.textContent = "stopped";
    } else {
      said.textContent = error.message;
      said.classList.add("wrong");
    }
    return null;
  } finally {
    said.setAttribute("aria-busy", "false");
  }
}

// The routing decision, from the answer itself: what decided this answer, not what would decide the next one.
function explain({ release, route, why }) {
  const routed = route !== "main";
  const name = routed ? `side ${route.replace("-", " ")}` : "main memory";
  $("edited-route").textContent = name;
  $("edited-route").className = routed ? "badge on" : "badge";
  $("why").hidden = false;
  $("verdict").textContent = verdict(release, name, routed, why);
  const near = why?.nearest_edits ?? [];
  drawScale(why, near);
  const [first, ...others] = near;
  behind = first;
  $("behind").replaceChildren(...(first ? [drawNear("div", first, routed ? "the edit behind it" : "the nearest edit")] : []));
  $("nearest").replaceChildren(...others.map((edit) => drawNear("li", edit)));
  $("others").hidden = !others.length;
}

function verdict(release, name, routed, why) {
  if (!release) return "No release is out yet, so the model answers as it was.";
  const who = name[0].toUpperCase() + name.slice(1);
  if (typeof why?.score !== "number") return `${who} answered.`;
  const score = number(why.score), threshold = number(why.threshold);
  return `${who} answered: the score ${score} is ${routed ? "" : "not "}above the threshold ${threshold}.`;
}

function drawNear(tag, edit, role) {
  const find = make("button", { type: "button", class: "link", "aria-label": `Find the edit: ${edit.prompt}` }, "Find");
  find.addEventListener("click", () => findEdits(edit.prompt));
  const numbers = [`score ${number(edit.score)}`];
  if (typeof edit.similarity === "number") numbers.push(`similarity ${number(edit.similarity)}`);
  return make(
    tag,
    role ? { class: "behind" } : {},
    make("p", { class: "what" }, edit.prompt, make("span", { class: "arrow" }, " → "), make("strong", {}, edit.target)),
    make("p", { class: "muted meta" }, role ? make("span", { class: "badge" }, role) : null,
      make("span", {}, numbers.join(" · ")), find),
  );
}

// Scores on a line, the threshold as a mark. The sentence above says the same.
function drawScale(why, near) {
  const scores = near.map((edit) => edit.score).filter((score) => typeof score === "number");
  $("scale").hidden = !scores.length || typeof why?.threshold !== "number";
  if ($("scale").hidden) return;
  const low = Math.min(why.threshold, ...scores), high = Math.max(why.threshold, ...scores);
  const at = (value) => `${6 + (88 * (value - low)) / (high - low || 1)}%`;
  const mark = (kind, value, ...inside) => {
    const element = make("span", { class: kind }, ...inside);
    element.style.left = at(value);
    return element;
  };
  $("scale").replaceChildren(
    mark("threshold", why.threshold, make("span", {}, `threshold ${number(why.threshold)}`)),
    ...scores.slice(1).map((score) => mark("dot", score)).reverse(),
    mark(scores[0] > why.threshold ? "dot first over" : "dot first", scores[0]),
  );
}
