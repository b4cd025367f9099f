// Starting, and looking again: gently, and not at all while nobody looks at the page.

const SOON = 3000, LATER = 20000, LATEST = 60000; // milliseconds
const RECENT = 60000; // so long after something was done here
let timer, pause = LATER;

$("door-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  enter();
});
document.addEventListener("release", () => {
  describeModel();
  part("releases", loadReleases());
  lookSoon(); // statuses change with it
});
document.addEventListener("visibilitychange", () => document.hidden || look());

async function enter() {
  openDoor();
  if (key !== null) $("question").focus();
  release = -1; // whatever answers first says so
  await look();
}

async function describeModel() {
  try {
    const { data: [model] } = await call("/v1/models");
    const name = model.wiseline.base_model.split("/").slice(-2).join("/"); // of a hub name all, of a path the end
    $("model").textContent = `${name} · release ${model.wiseline.release}`;
  } catch {
    $("model").textContent = ""; // the parts below say what is wrong
  }
}

// A part that fails says so in its own place and leaves the others alone. Resolves to the error, if there was one.
async function part(name, loading) {
  let error = null;
  try {
    await loading;
  } catch (caught) {
    error = caught;
  }
  if (error?.status !== 0) say(`${name}-wrong`, error?.message ?? "");
  return error;
}

async function look() {
  clearTimeout(timer);
  if (document.hidden || $("inside").hidden) return;
  const said = await Promise.all([part("edits", loadEdits()), part("round", loadRound())]);
  if ($("inside").hidden) return;
  const silent = said.some((error) => error?.status === 0);
  $("trouble").hidden = !silent;
  $("trouble").textContent = silent ? "The endpoint does not answer. Trying again." : "";
  const again = said.some((error) => error && (error.status === 0 || error.status === 429 || error.status >= 500));
  pause = again ? Math.min(2 * pause, LATEST) : running || Date.now() - newestAct < RECENT ? SOON : LATER;
  clearTimeout(timer);
  timer = setTimeout(look, pause);
}

function lookSoon() {
  clearTimeout(timer);
  pause = SOON;
  timer = setTimeout(look, pause);
}

enter();
