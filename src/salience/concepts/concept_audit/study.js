"use strict";
const steps = Array.from(document.querySelectorAll("main > section"));
const answers = { study: document.body.dataset.study, arm: document.body.dataset.arm, tasks: [], preferred: null };
let at = 0, since = performance.now();

function show(next) {
  steps.forEach((step, i) => { step.hidden = i !== next; });
  at = next;
  since = performance.now();
  window.scrollTo(0, 0);
}

function marked(step) {
  return Array.from(step.querySelectorAll("input[type=checkbox]")).filter((box) => box.checked);
}

// The explanation scores of what this person has marked: intercept plus the weights of the marked concepts.
function update(step) {
  const on = marked(step).map((box) => Number(box.dataset.index));
  const choices = Array.from(step.querySelectorAll(".choice[data-weights]"));
  const scores = choices.map((choice) => {
    const weights = JSON.parse(choice.dataset.weights);
    return on.reduce((sum, i) => sum + weights[i], Number(choice.dataset.intercept));
  });
  choices.forEach((choice, i) => {
    choice.querySelector(".score").textContent = scores[i].toFixed(2);
    choice.classList.toggle("best", scores[i] === Math.max(...scores));
  });
}

steps.forEach((step) => {
  const next = step.querySelector("button.next");
  const needed = step.querySelectorAll("input[type=radio]").length > 0;
  if (next && needed) next.disabled = true;
  step.addEventListener("change", () => {
    update(step);
    if (next && needed) next.disabled = step.querySelector("input[type=radio]:checked") === null;
  });
  update(step);
  if (next) next.addEventListener("click", () => {
    const chosen = step.querySelector("input[type=radio]:checked");
    if (step.dataset.task !== undefined) {
      answers.tasks.push({
        task: Number(step.dataset.task), marked: marked(step).map((box) => box.value),
        class: Number(chosen.value), seconds: Math.round((performance.now() - since) / 10) / 100,
      });
    } else if (chosen !== null) {
      answers.preferred = Number(chosen.value);
    }
    show(at + 1);
  });
});

document.getElementById("save").addEventListener("click", () => {
  const text = JSON.stringify(answers, null, 1);
  document.getElementById("copy").value = text;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "answers-" + answers.study + ".json";
  link.click();
});
show(0);
