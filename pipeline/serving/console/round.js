// The running round, by what it has left in the store: nothing here can disturb it.

const MOST_SHARDS = 120; // drawn; those that are not trained yet come first
const ORDER = ["extracted", "waiting", "trained"];
let running = false;

async function loadRound() {
  const now = await call("/v1/round");
  running = now.running !== null;
  $("round-work").hidden = !running;
  if (running) return drawRunning(now.running);
  say("round-said", "No round is running.");
  const ended = now.last && (now.last.missed ? "missed a threshold and published nothing" : "published a release");
  $("round-news").textContent = now.last ? `The last one ended ${since(now.last.ended)} and ${ended}.` : "None has run yet.";
}

function drawRunning(round) {
  const count = (state) => round.shards.filter((shard) => shard.state === state).length;
  const trained = count("trained"), all = round.shards.length;
  const next = trained === all ? " Merging and evaluating come next." : "";
  say("round-said", `Round ${round.round_id.slice(0, 8)}: ${trained} of ${all} shards trained.${next}`);
  $("round-news").textContent = `Began ${since(round.began)}. Last wrote something ${since(round.news)}.`;
  $("round-progress").max = Math.max(1, all);
  $("round-progress").value = trained;
  const many = all > MOST_SHARDS;
  const shards = many ? round.shards.toSorted((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state)) : round.shards;
  show($("shards"), [...shards.slice(0, MOST_SHARDS), ...(many ? [{ more: all - MOST_SHARDS }] : [])], {
    id: (shard) => (shard.more ? "more" : `${shard.memory}/${shard.shard}`),
    draw: (shard) => make("li", {}, make("span", { class: "name" }, shard.more ? "" : `${shard.memory}/${shard.shard}`), make("span", { class: "state" })),
    update: (row, shard) => {
      row.className = shard.more ? "muted" : shard.state;
      row.querySelector(".state").textContent = shard.more ? `and ${shard.more} more` : `${shard.edits} edits, ${shard.state}`;
    },
  });
}
