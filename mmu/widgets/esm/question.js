// A question with answers to choose from; each answer says why it is right or shows the case that breaks it.
function render({ model, el }) {
  const { question, choices, right } = model.get("data");
  const said = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const buttons = choices.map(({ answer, because }, i) =>
    h("button", { type: "button", class: "mmu-choice", "aria-pressed": "false", onclick: () => choose(i) },
      `${i + 1}. ${answer}`));
  const choose = (i) => {
    buttons.forEach((button, j) => {
      button.setAttribute("aria-pressed", String(i === j));
      button.dataset.sign = i !== j ? "" : i === right ? "✓" : "✗";
    });
    said.textContent = `${i === right ? "✓ Yes." : "✗ No."} ${choices[i].because}`;
    said.dataset.right = String(i === right);
  };
  el.classList.add("mmu-question");
  el.append(
    h("p", { class: "mmu-asked" }, h("strong", {}, "Predict. "), question),
    h("div", { class: "mmu-choices", role: "group", "aria-label": "Answers" }, buttons), said,
    h("span", { class: "mmu-keys" }, `Click or Tab here, then: 1–${choices.length} choose`));
  onKeys(el, Object.fromEntries(choices.map((_, i) => [String(i + 1), () => { buttons[i].focus(); choose(i); }])));
}
export default { render };
