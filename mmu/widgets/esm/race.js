// The race game: the reader schedules vCPUs on the program's own state graph, which Python computed and named.
const SHAPE = ["●", "■", "▲"];
const SEEN = { SC: "a store is seen by all at once", TSO: "a store waits in its vCPU's buffer until it drains" };
const DRAIN = ["q", "w", "e"]; // the key that drains the buffer of vCPU 0, 1, 2
const SIGN = { barrier: "━", succeeded: "◆", failed: "◇", drain: "↓" };

// The invariant's text on one state's values: names, numbers, comparisons, not, and, or, parentheses.
const judge = (text, value) => {
  const words = text.match(/done\(\w+\)|[A-Za-z_][\w.[\]]*|\d+|[=!<>]=|[<>()]/g) ?? ["0"];
  let at = 0;
  const atom = () => {
    const word = words[at++];
    if (word === "not") return !compared();
    if (word === "(") { const inside = either(); at++; return inside; }
    return /^\d/.test(word) ? Number(word) : value(word);
  };
  const TEST = { "==": (a, b) => a == b, "!=": (a, b) => a != b, "<": (a, b) => a < b, ">": (a, b) => a > b,
    "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };
  const compared = () => { const a = atom(); const test = TEST[words[at]]; if (!test) return a; at++; return test(a, atom()); };
  const both = () => { let all = compared(); while (words[at] === "and") { at++; const next = compared(); all = all && next; } return all; };
  const either = () => { let any = both(); while (words[at] === "or") { at++; const next = both(); any = any || next; } return any; };
  return Boolean(either());
};

function render({ model, el }) {
  const game = model.get("data");
  const { actors, shared, here, locals, first, moves, left, says, codes, kinds } = game;
  const parts = game.words.flatMap(({ parts }) => parts);
  const local = (actor, state) => locals[actor][here[actor][state]];
  const values = (state) => Object.fromEntries(parts.map(([name, shift, mask]) => [name, shared[state] >> shift & mask]));
  const movesOf = (state) => {
    const found = [];
    for (let i = first[state]; i < first[state + 1]; i += 5)
      found.push({ actor: moves[i], code: codes[moves[i + 1]], kind: kinds[moves[i + 2]], say: says[moves[i + 3]], to: moves[i + 4] });
    return found;
  };
  const broken = (state) => {
    const seen = values(state);
    return actors.some((_, a) => local(a, state).end === "oops") || judge(game.invariant, (name) => {
      const path = /^done\((\w+)\)$/.exec(name)?.[1];
      return path ? actors.every((_, a) => !game.paths[a].includes(path) || local(a, state).end === "done") : seen[name];
    });
  };
  const show = (state) => {
    const seen = values(state);
    return game.words.map(({ name, parts: [...mine] }) => mine.length === 1 && mine[0][0] === name ? `${name}=${seen[name]}`
      : `${name}(${mine.map(([full]) => `${full.slice(name.length + 1)}=${seen[full]}`).join(", ")})`).join(" ");
  };
  const many = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
  const winnable = left[0] >= 0;

  // The line that is played: moves, and how many of them are done. Undo goes back in it, a new move cuts off its rest.
  let line = [], at = 0, walked = "";
  const replay = (list) => {
    let state = 0;
    const found = [];
    for (const code of list) {
      const move = movesOf(state).find((move) => move.code === code);
      if (!move) break;
      found.push(move);
      state = move.to;
    }
    return found;
  };
  const now = () => at ? line[at - 1].to : 0;
  const won = () => line.slice(0, at).some((move) => broken(move.to)) || broken(0);
  const refused = (actor, drain) => {
    const { buffer, end, next } = local(actor, now());
    if (drain) return `The store buffer of vCPU ${actor} is empty.`;
    if (end) return `vCPU ${actor} is done.`;
    const waits = /  wait (.+)/.exec(next)?.[1];
    if (waits) return `vCPU ${actor} waits until this holds: ${waits}.`;
    return buffer.length ? `vCPU ${actor} must wait until its store buffer is empty: drain it (${DRAIN[actor].toUpperCase()}).` : `vCPU ${actor} waits for the lock.`;
  };
  // Where a vCPU has the choice of a path, its digit asks and the path's letter answers: the first of its name that no other key has.
  const letters = {};
  for (const path of new Set(game.paths.filter((paths) => paths.length > 1).flat()))
    letters[path] = [...path].find((letter) => !"urqwe".includes(letter) && !Object.values(letters).includes(letter));
  const pathOf = (move) => game.paths[move.actor][move.code.split(".")[1] ?? 0];
  const choices = (actor) => local(actor, now()).next.startsWith("chooses ")
    ? movesOf(now()).filter((move) => move.actor === actor && move.kind !== "drain") : [];
  let asked = null; // the vCPU whose digit was pressed last, if it has a choice
  const act = (actor, drain) => {
    if (!won() && !drain && choices(actor).length > 1) {
      draw(`vCPU ${actor} chooses: ${choices(actor).map((move) => `${letters[pathOf(move)].toUpperCase()} ${pathOf(move)}`).join(", ")}.`);
      asked = actor;
      return;
    }
    const move = movesOf(now()).find((move) => move.actor === actor && (move.kind === "drain") === drain);
    if (!move) { if (actor < actors.length) draw(refused(actor, drain)); return; }
    take(move);
  };
  const choose = (path) => {
    const able = actors.flatMap((_, a) => asked === null || asked === a ? choices(a) : []).filter((move) => pathOf(move) === path);
    if (able.length === 1) take(able[0]);
    else draw(able.length ? `Which vCPU is to ${path}? Press its digit first.` : `No vCPU can begin ${path} now.`);
  };
  const take = (move) => {
    if (won()) { draw(); return; }
    line = [...line.slice(0, at), move];
    at += 1;
    draw();
  };
  const go = (to) => { at = Math.max(0, Math.min(line.length, to)); draw(); };
  const load = (list, to) => { line = replay(list); at = to ?? line.length; draw(); };
  const reset = () => { line = replay(game.line); at = 0; draw(); };
  const shortest = () => {
    const path = [];
    for (let state = 0; left[state] > 0; state = path.at(-1).to)
      path.push(movesOf(state).find((move) => left[move.to] === left[state] - 1));
    return path;
  };

  // Every state, breadth first, in the reader's own browser.
  const walk = () => {
    const seen = new Uint8Array(shared.length), queue = [0];
    seen[0] = 1;
    let tried = 0, bad = 0;
    for (const state of queue) {
      if (broken(state)) bad++;
      for (const { to } of movesOf(state)) {
        tried++;
        if (!seen[to]) { seen[to] = 1; queue.push(to); }
      }
    }
    walked = `Your browser has visited ${many(queue.length, "state")} by ${many(tried, "move")} and found OOPS in ${bad || "none"} of them.`
      + (bad ? "" : " No schedule breaks this protocol.");
    draw();
  };

  const spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const wordBox = h("div", { class: "mmu-words", "aria-label": "Shared words", role: "group" });
  const cards = actors.map((role, a) => {
    const next = h("code", { class: "mmu-next" }), buffer = h("span", { class: "mmu-buffer" }), knows = h("span", { class: "mmu-knows" });
    const options = h("div", { class: "mmu-options" });
    const card = h("div", { class: "mmu-actor", "data-actor": a, role: "group", "aria-label": `vCPU ${a}: ${role}` },
      h("span", {}, h("strong", {}, h("span", { class: "mmu-shape", "aria-hidden": "true" }, SHAPE[a]), ` vCPU ${a}`), " ",
        role.split(/(?<=_)/).flatMap((part, i) => i ? [h("wbr"), part] : [part])), next, knows, buffer, options);
    return { card, next, buffer, knows, options };
  });
  const lanes = h("ol", { class: "mmu-lanes", tabindex: 0, "aria-label": "Moves so far" });
  const button = (text, onclick, extra = {}) => h("button", { type: "button", onclick, ...extra }, text);
  const undo = button("Undo", () => go(at - 1)), again = button("Reset", reset);
  const forward = button("Next", () => go(at + 1));
  const stepBack = button("Step back to where OOPS is still possible", () => {
    let to = at;
    while (to > 0 && left[to ? line[to - 1].to : 0] < 0) to--;
    go(to);
  });
  const best = button("Play the shortest", () => { line = shortest(); at = 0; draw(`Loaded: ${many(line.length, "move")}. Press → to play them.`); });
  const all = button("Let my browser walk every state", walk);
  const link = h("a", { class: "mmu-link" }, "Link to this schedule");
  const proof = h("p", { class: "mmu-proof", role: "status", "aria-live": "polite" });

  const lane = (move, number, holds) => h("li", { "data-kind": move.kind, "data-actor": move.actor },
    h("span", { class: "mmu-number" }, number),
    actors.map((_, a) => h("span", { class: "mmu-lane", "data-actor": a, "data-lock": holds === a && "held", "aria-hidden": "true" },
      a === move.actor ? h("span", { class: "mmu-mark" }, SIGN[move.kind] ?? SHAPE[a]) : "")),
    h("span", { class: "mmu-told" }, h("span", { class: "mmu-who" }, `vCPU ${move.actor} `), move.say));

  const draw = (note) => {
    asked = null;
    const inside = el.contains(document.activeElement);
    const state = now(), before = at > 1 ? line[at - 2].to : 0, bad = won(), dead = winnable && !bad && left[state] < 0;
    const options = movesOf(state), seen = values(state), old = values(before);
    wordBox.replaceChildren(...game.words.map(({ name, parts }) => h("span", { class: "mmu-word" }, parts.map(([full]) =>
      h("span", { class: "mmu-part", "data-changed": at > 0 && seen[full] !== old[full] && "yes" }, `${full} `, h("b", {}, seen[full]))))));
    cards.forEach(({ card, next, buffer, knows, options: box }, a) => {
      const { next: text, end, knows: known, buffer: waiting } = local(a, state);
      const mine = bad ? [] : options.filter((move) => move.actor === a);
      const focused = box.contains(document.activeElement) ? [...box.children].indexOf(document.activeElement) : -1;
      next.textContent = end ? (end === "oops" ? "OOPS" : "done") : text;
      knows.textContent = known ? `remembers ${known}` : "";
      buffer.replaceChildren(...(game.memory === "TSO" ? ["store buffer: ", waiting.length ? waiting.map((entry) => h("span", { class: "mmu-entry" }, entry)) : "empty"].flat() : []));
      const steps = mine.filter((move) => move.kind !== "drain"), drain = mine.find((move) => move.kind === "drain");
      const labels = steps.length > 1 ? steps.map((move) => [`${move.code} ${pathOf(move)} (${letters[pathOf(move)].toUpperCase()})`, move]) : [[`Step ${a}`, steps[0]]];
      if (game.memory === "TSO") labels.push([`Drain ${a}`, drain]);
      box.replaceChildren(...labels.map(([label, move]) => button(label, () => move && take(move), { disabled: !move })));
      card.dataset.done = end ? "yes" : "no";
      if (focused >= 0) box.children[focused]?.focus();
    });
    let holds = null;
    lanes.replaceChildren(...line.slice(0, at).map((move, i) => {
      if (move.kind === "locks") holds = move.actor;
      const row = lane(move, i + 1, holds);
      if (move.kind === "unlocks") holds = null;
      return row;
    }), ...(bad ? [h("li", { class: "mmu-oops" }, h("span", { "aria-hidden": "true" }, "✕ "), `OOPS: ${game.broken}.`)] : []));
    lanes.scrollTop = lanes.scrollHeight;
    const last = at ? line[at - 1] : null;
    const told = note ?? (last ? `Move ${at}. vCPU ${last.actor}: ${last.say}.` : `${game.title}. At the start.`);
    let end = "";
    if (bad) {
      const least = left[0], used = at;
      end = ` OOPS: ${game.broken}. You needed ${many(used, "move")}; ` + (used <= least ? "there is no shorter way." : `the shortest way takes ${least}.`);
    } else if (!options.length) end = ` All are done and nothing broke. Try another way (U undoes, R starts over)${winnable ? "" : ", or let the page try them all"}.`;
    else if (dead) end = " From here OOPS can no longer happen. Undo (U) or step back.";
    else if (!at && !note) end = ` Press ${line.length ? "→ to see it happen" : `${actors.slice(1).map((_, a) => a).join(", ")} or ${actors.length - 1}: that vCPU takes its next step`}.`;
    spoken.textContent = `${told} ${show(state)}.${end}`;
    spoken.dataset.ended = bad ? "oops" : dead || !options.length ? "dead" : "open";
    undo.disabled = !at;
    forward.disabled = at >= line.length;
    forward.hidden = !line.length;
    stepBack.hidden = !dead;
    best.hidden = !(bad && at > left[0]);
    all.hidden = winnable && !bad && !walked;
    proof.textContent = walked;
    link.href = `#race-${game.name}=${line.slice(0, at).map((move) => move.code).join(",")}`;
    link.hidden = !at;
    const focus = document.activeElement; // keys must go on working when the button that had the focus went away
    if (inside && (!el.contains(focus) || focus.hidden || focus.disabled)) el.focus({ preventScroll: true });
  };

  // A link that replays a schedule: #race-NAME=0,0,1d
  const follow = () => {
    const [name, list] = decodeURIComponent(window.location.hash).split("=");
    if (name !== `#race-${game.name}` || list == null) return;
    load(list.split(",").filter(Boolean));
    requestAnimationFrame(() => el.scrollIntoView({ block: "start" }));
  };

  el.classList.add("mmu-race");
  el.append(
    h("p", { class: "mmu-title" }, h("strong", {}, game.title), ` · ${game.memory}: ${SEEN[game.memory]}. ${many(shared.length, "state")} can be reached. OOPS when `, game.invariant === "0" ? game.broken : h("code", {}, game.invariant)),
    wordBox, h("div", { class: "mmu-actors" }, cards.map(({ card }) => card)), spoken,
    h("div", { class: "mmu-controls" }, undo, forward, again, stepBack, best, all, link,
      h("span", { class: "mmu-keys" }, `Click or Tab here, then: ${actors.map((_, a) => a).join(" ")} step that vCPU`
        + (game.memory === "TSO" ? `, ${DRAIN.slice(0, actors.length).join(" ").toUpperCase()} (or Shift and the digit) drain its buffer` : "")
        + (Object.keys(letters).length ? `; where a vCPU has a choice, its digit and then ${Object.entries(letters).map(([path, letter]) => `${letter.toUpperCase()} ${path}`).join(", ")}` : "")
        + ", U or ← undo, → redo, R reset")),
    lanes, proof, // they grow: what is pressed stays where it is
    h("details", { class: "mmu-program" }, h("summary", {}, "The program, with comments"),
      h("pre", { tabindex: 0, "aria-label": "The program" }, game.program),
      // a notebook has no such page beside it
      window.MMU_PLAYERS ? h("p", {}, h("a", { href: "06-store-buffers.html#race-language" }, "How to read its lines")) : null));
  el.tabIndex = 0;
  el.setAttribute("role", "group");
  el.setAttribute("aria-label", `${game.title}: race game`);
  const drains = Object.fromEntries(DRAIN.slice(0, actors.length).map((key, a) => [key, () => act(a, true)]));
  const digits = Object.fromEntries(actors.map((_, a) => [String(a), () => act(a, false)]));
  el.addEventListener("keydown", (event) => { // Shift and a digit, where that types another sign
    const digit = event.shiftKey && !/^\d$/.test(event.key) && /^Digit([0-2])$/.exec(event.code)?.[1];
    if (!digit || Number(digit) >= actors.length) return;
    act(Number(digit), true);
    event.preventDefault();
    event.stopImmediatePropagation();
  });
  const begin = Object.fromEntries(Object.entries(letters).map(([path, letter]) => [letter, () => choose(path)]));
  onKeys(el, { ...begin, ...digits, ...drains, u: () => go(at - 1), ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1), r: reset });
  window.addEventListener("hashchange", follow);
  reset();
  follow();
  return () => window.removeEventListener("hashchange", follow);
}
export default { render };
