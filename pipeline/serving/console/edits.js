// The edit log: search, add, retract. Statuses are looked at again by themselves.

let edits = [];
let newestAct = 0; // when something was changed here; for a while after that statuses are looked at more often
let searches = 0;
let typing;

$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(searchAnew, 250);
});
$("status").addEventListener("change", () => searchAnew());
$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  searchAnew();
});
$("edits-more").addEventListener("click", () => part("edits", loadEdits({ more: true })));
$("add-form").addEventListener("submit", (event) => {
  event.preventDefault();
  addEdit();
});

function sayOfEdits(what) {
  $("edits-said").classList.toggle("wrong", what instanceof Error);
  $("edits-said").textContent = what instanceof Error ? what.message : what;
}

async function searchAnew() {
  if (await part("edits", loadEdits())) return;
  announce(edits.length ? `${edits.length}${$("edits-more").hidden ? "" : " or more"} edits found.` : "No edit found.");
}

// What is searched for, from the first page on, as many as are shown; or with `more` the page behind those.
async function loadEdits({ more = false } = {}) {
  const mine = ++searches;
  const fields = new URLSearchParams({ query: $("search").value, limit: more ? 20 : Math.min(200, Math.max(20, edits.length)) });
  if ($("status").value) fields.set("status", $("status").value);
  if (more) fields.set("after", edits.at(-1).seq);
  const page = await call(`/v1/edits?${fields}`);
  if (mine !== searches) return; // a later search is under way
  edits = more ? [...edits, ...page.data] : page.data;
  $("edits-more").hidden = !page.has_more;
  drawEdits();
}

function drawEdits() {
  const empty = { id: "", none: true };
  show($("edits-list"), edits.length ? edits : [empty], {
    id: (edit) => edit.id,
    draw: (edit) => (edit.none ? make("li", { class: "muted" }, "No edits.") : drawEdit(edit)),
    update: (row, edit) => edit.none || updateEdit(row, edit),
  });
}

function drawEdit(edit) {
  const before = edit.ground_truth ? make("s", {}, make("span", { class: "unseen" }, "until now "), edit.ground_truth) : null;
  const retract = make("button", { type: "button", "aria-label": `Retract: ${edit.prompt}` }, "Retract");
  retract.addEventListener("click", () => retractEdit(edit));
  return make(
    "li",
    { class: "with-action" },
    make("p", { class: "what" }, edit.prompt, make("span", { class: "arrow" }, " → "), before, before && " ", make("strong", {}, edit.target)),
    make(
      "p",
      { class: "muted meta" },
      make("span", { class: "badge status" }),
      edit.subject ? make("span", {}, edit.subject) : null,
      edit.author ? make("span", {}, `by ${edit.author}`) : null,
      time(edit.ingested),
    ),
    retract,
  );
}

function updateEdit(row, edit) {
  const badge = row.querySelector(".status");
  if (badge.textContent && badge.textContent !== edit.status) announce(`${edit.prompt}: now ${edit.status}.`);
  badge.textContent = edit.status;
  badge.classList.toggle("on", edit.status === "served");
  row.querySelector("time").textContent = since(edit.ingested);
}

// Opens the form, with what is known filled in.
function startEdit({ prompt, before, subject }) {
  $("add").open = true;
  $("add-prompt").value = prompt;
  $("add-before").value = before;
  $("add-subject").value = subject;
  $("add-target").value = "";
  $("add-target").focus();
}

async function addEdit() {
  const edit = { prompt: $("add-prompt").value, target: $("add-target").value };
  if ($("add-subject").value.trim()) edit.subject = $("add-subject").value;
  if ($("add-before").value.trim()) edit.ground_truth = $("add-before").value;
  try {
    const told = await call("/v1/edits", { method: "POST", body: edit });
    const status = told.accepted[0].status;
    sayOfEdits(told.new ? `Added; its status is “${status}”.` : "The log says so already.");
    $("add-form").reset();
    $("add-prompt").focus();
    await actedOnEdits();
  } catch (error) {
    sayOfEdits(error);
  }
}

async function retractEdit(edit) {
  const place = edits.findIndex((one) => one.id === edit.id);
  const told = await confirmed({
    title: "Retract this edit?",
    text: `“${edit.prompt}” is then no longer answered with “${edit.target}”. Adding the edit again undoes this.`,
    yes: "Retract",
    act: () => call(`/v1/edits/${encodeURIComponent(edit.id)}`, { method: "DELETE" }),
  });
  if (!told) return;
  sayOfEdits(told.served_until_next_release ? "Retracted. It is answered until the next release." : "Retracted.");
  await actedOnEdits();
  const rows = $("edits-list").querySelectorAll("button");
  (rows[Math.min(place, rows.length - 1)] ?? $("search")).focus();
}

async function actedOnEdits() {
  newestAct = Date.now();
  await loadEdits();
  lookSoon();
}

function findEdits(words) {
  $("search").value = words;
  $("status").value = "";
  $("search").focus();
  searchAnew();
}
