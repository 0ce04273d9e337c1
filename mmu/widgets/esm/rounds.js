// The rounds player: one setting of up to three choices, and for it the faults of each round on each machine, sorted by kind.
// Every number and sentence is a run of mmu.rounds; this module only picks and draws.
function render({ model, el }) {
  const data = model.get("data"), { by, choices, machines, most, runs } = data;
  const sizes = choices.map((choice) => choice.values.length);
  const place = (at) => at.reduce((sum, value, i) => sum * sizes[i] + value, 0);
  const parse = (text) => text.split(",").map(Number);
  const change = (which, by, wrap = false) => {
    const at = parse(chosen), next = at[which] + by;
    at[which] = wrap ? (next + sizes[which]) % sizes[which] : Math.max(0, Math.min(sizes[which] - 1, next));
    state.set(at.join());
  };
  const pick = (which, value) => { const at = parse(chosen); at[which] = value; state.set(at.join()); };

  const swatch = ({ name, pattern }, fast, style, n) => h("span",
    { class: "mmu-part", "data-pattern": fast ? "fast" : pattern, style, title: n && `${name}: ${n}` });
  const groups = choices.map((choice, which) => choice.values.map((value, i) =>
    h("button", { type: "button", class: "mmu-choice", onclick: () => pick(which, i) }, value)));
  const spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const panels = machines.map((name) => {
    const body = h("tbody", {});
    return { body, box: h("table", { class: "mmu-rounds-table" }, h("caption", {}, name),
      h("thead", {}, h("tr", {}, ["round", `faults by ${by}`, "named", "written"].map((t) => h("th", { scope: "col" }, t)))), body) };
  });
  const undo = h("button", { type: "button", onclick: () => state.undo() }, "Undo");

  const legend = h("ul", { class: "mmu-legend" });
  let chosen; // where the buttons stand
  const draw = (value) => { // the choices of a stored run, or a run that the kernel made
    const stored = typeof value === "string";
    if (stored) chosen = value;
    const at = parse(chosen), { run, kinds } = stored ? { run: runs[place(at)], kinds: data.kinds } : value;
    groups.forEach((group, which) => group.forEach((button, i) =>
      button.setAttribute("aria-pressed", String(stored && at[which] === i))));
    legend.replaceChildren(...kinds.flatMap((kind) => [
      kind.fast && h("li", {}, swatch(kind, true), ` ${kind.name}, repaired without the lock`),
      kind.slow && h("li", {}, swatch(kind, false), ` ${kind.name}${kind.fast ? ", under the lock" : ""}`)]).filter(Boolean));
    panels.forEach(({ body }, m) => {
      const { rounds, dirty, written } = run.machines[m];
      body.replaceChildren(...rounds.map((row, i) => {
        const parts = row.map(([kind, fast, n]) => swatch(kinds[kind], fast, `width: ${(100 * n / most).toFixed(2)}%`, n));
        const total = row.reduce((sum, [, , n]) => sum + n, 0);
        return h("tr", {}, h("th", { scope: "row" }, String(i + 1)),
          h("td", {}, h("div", { class: "mmu-row" }, h("span", { class: "mmu-bar" }, ...parts), h("span", { class: "mmu-total" }, String(total)))),
          h("td", { class: dirty[i] > written[i] ? "mmu-more" : "" }, String(dirty[i])), h("td", {}, String(written[i])));
      }));
    });
    spoken.replaceChildren(...[run.asked, ...run.machines.map((machine) => machine.told)].map((text) => h("span", {}, text + " ")));
    grey(undo, !state.depth);
  };
  const hints = ["← → how often", "W how much is written", "E table edits"];
  const state = history(sizes.map((size) => size > 2 ? 1 : 0).join(), draw);

  el.classList.add("mmu-rounds");
  el.append(
    ...choices.map((choice, which) => choice.values.length < 2 ? null : h("div", { class: "mmu-tabs", role: "group", "aria-label": choice.name },
      h("span", { class: "mmu-tab-name" }, choice.name), groups[which])).filter(Boolean),
    h("div", { class: "mmu-panels" }, panels.map((panel) => panel.box)),
    legend,
    spoken,
    live(model, (answer) => state.set(answer)) ?? "",
    h("div", { class: "mmu-controls" },
      h("button", { type: "button", onclick: () => change(0, -1), "aria-label": "Read the log more often" }, "◀"),
      h("button", { type: "button", onclick: () => change(0, 1), "aria-label": "Read the log less often" }, "▶"),
      undo, h("button", { type: "button", onclick: () => state.reset() }, "Reset"),
      h("span", { class: "mmu-keys" }, `Click or Tab here, then: ${hints.filter((_, i) => sizes[i] > 1).join(", ")}, U undo, R reset`)));
  onKeys(el, {
    ArrowLeft: () => change(0, -1), ArrowRight: () => change(0, 1), w: () => change(1, 1, true), e: () => change(2, 1, true),
    u: () => state.undo(), r: () => state.reset(),
  });
  draw(state.value);
}
export default { render };
