// Releases with their scores. A rollback is a release too, so nothing here cannot be undone.

const SHOWN_SCORES = ["reliability", "generalization", "locality"];
let releases = [];

$("releases-more").addEventListener("click", () => part("releases", loadReleases({ more: true })));

async function loadReleases({ more = false } = {}) {
  const after = more ? `&after=${releases.at(-1).number}` : "";
  const page = await call(`/v1/releases?limit=${more ? 10 : Math.min(100, Math.max(5, releases.length))}${after}`);
  releases = more ? [...releases, ...page.data] : page.data;
  $("releases-more").hidden = !page.has_more;
  const empty = { number: 0, none: true };
  show($("releases-list"), releases.length ? releases : [empty], {
    id: (one) => one.number,
    draw: (one) => (one.none ? make("li", { class: "muted" }, "Nothing is published yet: the model answers as it was.") : drawRelease(one)),
    update: (row, one) => one.none || updateRelease(row, one),
  });
}

function drawRelease(one) {
  const title = make("p", { class: "what" }, make("strong", {}, `Release ${one.number}`), " ", make("span", { class: "badge status" }));
  if (one.error) return make("li", {}, title, make("p", { class: "wrong" }, one.error));
  const restores = one.restores ? `restores release ${one.restores}` : "";
  const about = make("p", { class: "muted meta" }, make("span", {}, `${one.edits} edits`), time(one.published), restores && make("span", {}, restores));
  const back = make("button", { type: "button", "aria-label": `Roll back to release ${one.number}` }, "Roll back");
  back.addEventListener("click", () => rollBack(one));
  return make("li", { class: "with-action" }, title, about, drawScores(one.scores), back);
}

function drawScores(scores) {
  const list = make("dl", { class: "scores" });
  for (const name of SHOWN_SCORES.filter((name) => name in scores)) {
    const score = scores[name], bar = make("i");
    bar.style.width = `${100 * Math.max(0, Math.min(1, score))}%`;
    list.append(make("div", {}, make("dt", {}, name), make("dd", {}, make("span", { class: "bar", "aria-hidden": "true" }, bar), score.toFixed(3))));
  }
  return list;
}

function updateRelease(row, one) {
  const badge = row.querySelector(".status");
  badge.textContent = one.served ? "in use" : one.head ? "newest, not yet in use" : "";
  badge.classList.toggle("on", one.served);
  badge.hidden = !badge.textContent;
  if (row.querySelector("time")) row.querySelector("time").textContent = since(one.published);
  const back = row.querySelector("button");
  if (back) back.hidden = one.head; // that is where we are
}

async function rollBack(one) {
  const restored = await confirmed({
    title: `Roll back to release ${one.number}?`,
    text: `Its ${one.edits} edits are published again as a new release, and answered within seconds. Nothing is deleted: you can roll back from it too.`,
    yes: `Roll back to ${one.number}`,
    act: () => call("/v1/releases/rollback", { method: "POST", body: { release: one.number } }),
  });
  if (!restored) return;
  say("releases-said", `Release ${restored.number} is published; it restores release ${restored.restores}.`);
  newestAct = Date.now();
  await loadReleases();
  lookSoon();
}
