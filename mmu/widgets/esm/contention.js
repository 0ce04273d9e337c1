// The player of contention: three sliders choose one of the runs that mmu.cost.price made; two bars compare them.
function render({ model, el }) {
  const { sliders, states, start } = model.get("data");
  const sizes = sliders.map((slider) => slider.values.length);
  const split = (at) => [Math.floor(at / (sizes[1] * sizes[2])), Math.floor(at / sizes[2]) % sizes[1], at % sizes[2]];
  const join = ([a, b, c]) => (a * sizes[1] + b) * sizes[2] + c;
  const move = (which, to) => {
    const place = split(at);
    place[which] = Math.max(0, Math.min(sizes[which] - 1, to));
    state.set(join(place));
  };
  const step = (which, by) => move(which, split(at)[which] + by);
  const turn = (which) => move(which, (split(at)[which] + 1) % sizes[which]);

  const inputs = sliders.map((slider, i) => h("input", {
    type: "range", min: 0, max: sizes[i] - 1, step: 1, "aria-label": slider.name,
    oninput: (event) => move(i, Number(event.target.value)),
    onkeydown: (event) => {
      const key = event.key.toLowerCase();
      if (key === "u") state.undo();
      if (key === "r") state.reset();
    },
  }));
  const shown = sliders.map(() => h("output", { class: "mmu-slider-value" }));
  const bars = [["lock", "under the lock"], ["fast", "fast path"]].map(([kind, name]) => {
    const bar = h("span", { class: "mmu-bar", "data-kind": kind }), number = h("span", { class: "mmu-bar-number" });
    return { kind, bar, number, row: h("div", { class: "mmu-bar-row" }, h("span", { class: "mmu-bar-name" }, name),
      h("span", { class: "mmu-bar-room" }, bar), number) };
  });
  const spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const undo = h("button", { type: "button", onclick: () => state.undo() }, "Undo");

  let at = start; // where the sliders stand
  const draw = (value) => { // the number of a stored run, or a run that the kernel made
    if (typeof value === "number") at = value;
    const here = typeof value === "number" ? states[value] : value, place = split(at);
    inputs.forEach((input, i) => {
      input.value = String(place[i]);
      input.setAttribute("aria-valuetext", sliders[i].values[place[i]]);
      shown[i].textContent = sliders[i].values[place[i]];
    });
    const most = Math.max(here.lock, here.fast);
    bars.forEach(({ kind, bar, number }) => {
      bar.style.width = `${100 * here[kind] / most}%`;
      number.textContent = `${here[kind].toFixed(1)} M/s`;
    });
    spoken.textContent = here.said;
    grey(undo, !state.depth);
  };
  const state = history(start, draw);

  el.classList.add("mmu-contention");
  el.append(
    h("div", { class: "mmu-sliders" }, sliders.map((slider, i) =>
      h("label", { class: "mmu-slider" }, h("span", {}, `${slider.name} (${slider.key})`), inputs[i], shown[i]))),
    h("div", { class: "mmu-bars-of-two", "aria-hidden": "true" }, bars.map((bar) => bar.row)), spoken,
    live(model, (answer) => state.set(answer.state)) ?? "",
    h("div", { class: "mmu-controls" }, undo,
      h("button", { type: "button", onclick: () => state.reset() }, "Reset"),
      h("span", { class: "mmu-keys" }, "Click or Tab here, then: ← → vCPUs, W writes, ↑ ↓ lock held, U undo, R reset")));
  onKeys(el, {
    ArrowLeft: () => step(0, -1), ArrowRight: () => step(0, 1), w: () => turn(1),
    ArrowUp: () => step(2, 1), ArrowDown: () => step(2, -1), u: () => state.undo(), r: () => state.reset(),
  });
  draw(start);
}
export default { render };
