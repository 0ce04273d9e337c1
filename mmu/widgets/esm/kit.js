// What every player shares. Prepended to each player's module, so that one file serves JupyterLab and a static page.

// Make an element: h("button", {class: "x", onclick: f}, "text", child)
const h = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
};

// What stands above a player's buttons stays as high as it has been, so that the buttons stay where they are.
const steady = (el) => {
  let width = 0, highest = new Map();
  const settle = () => {
    const controls = [...el.children].findIndex((child) => child.matches(".mmu-controls"));
    const above = [...el.children].slice(0, Math.max(controls, 0));
    if (el.clientWidth !== width) { width = el.clientWidth; highest = new Map(); }
    above.forEach((child) => { child.style.minHeight = ""; child.style.boxSizing = "border-box"; });
    const heights = above.map((child) => Math.max(child.offsetHeight, highest.get(child) ?? 0));
    above.forEach((child, i) => { highest.set(child, heights[i]); child.style.minHeight = `${heights[i]}px`; });
  };
  new MutationObserver(settle).observe(el, { childList: true, characterData: true, subtree: true });
  new ResizeObserver(() => el.clientWidth !== width && settle()).observe(el);
};

// Keys of a player: {ArrowLeft: f, u: f}. They count while the focus is anywhere inside it. Keys that a player uses,
// and every key inside its controls, stop here: JupyterLab in command mode would take them on their way up.
const onKeys = (el, keys) => {
  el.classList.add("mmu-play");
  el.tabIndex = -1; // a click anywhere inside gives the player its keys; Tab finds its controls
  el.addEventListener("keydown", (event) => {
    const inside = event.target.matches("input, select, textarea, button");
    const action = event.ctrlKey || event.altKey || event.metaKey ? undefined
      : keys[event.key] ?? keys[event.key.toLowerCase()];
    const native = event.target.matches("input, select, textarea");
    if (action && !native) { action(); event.preventDefault(); }
    if (inside || action) event.stopPropagation();
  });
  steady(el);
};

// Grey a button out without taking its focus away, as `disabled` would: the next key must still find the player.
const grey = (button, off) => button.setAttribute("aria-disabled", String(off));

// A state with undo: state.value, state.set(v), state.undo(), state.reset(); draw(value) after each change.
const history = (start, draw) => {
  const past = [];
  const state = {
    value: start,
    get depth() { return past.length; },
    set(value) { if (value !== state.value) { past.push(state.value); state.value = value; draw(value); } },
    undo() { if (past.length) { state.value = past.pop(); draw(state.value); } },
    reset() { past.length = 0; state.value = start; draw(start); },
  };
  return state;
};

// With a kernel: one number for each setting and a button that has the package run it; `shown(answer)` draws the run.
// On a page there is no kernel and nothing here.
const live = (model, shown) => {
  const fields = model.get("live") ?? [];
  if (!fields.length) return null;
  const inputs = fields.map(([, value]) => h("input", { type: "number", step: "any", value }));
  const said = h("span", { class: "mmu-live-said", role: "status" });
  const show = () => {
    const answer = model.get("answer");
    said.textContent = answer.error ?? "";
    if (!answer.error) shown(answer);
  };
  model.on("change:answer", show);
  return h("form", {
    class: "mmu-live",
    onsubmit: (event) => {
      event.preventDefault();
      const ask = inputs.map((input) => Number(input.value));
      if (String(ask) === String(model.get("ask"))) return show(); // answered already
      said.textContent = "running …";
      model.set("ask", ask);
      model.save_changes();
    },
  }, h("span", {}, "Any other setting:"), fields.map(([name], i) => h("label", {}, name, inputs[i])),
  h("button", { type: "submit" }, "Run"), said);
};
