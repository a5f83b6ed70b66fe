"use strict";
const root = document.documentElement;
const theme = document.getElementById("theme");
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches;
}

function nameTheme() {
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `switch to ${isDark() ? "light" : "dark"} colours`);
}

theme.hidden = false;
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
prefersDark.addEventListener("change", nameTheme);
nameTheme();
if (window.matchMedia("(max-width: 1079px)").matches) document.querySelector("nav details").open = false;

for (const form of document.querySelectorAll(".filters")) {
  const samples = [...form.nextElementSibling.querySelectorAll(".sample")];
  const search = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
  const value = (name) => form.elements[name].value;

  const matches = (sample) => {
    const cells = [...sample.querySelectorAll("td[data-run]")].filter(
      (cell) =>
        (!value("run") || cell.dataset.run === value("run")) &&
        (!value("pattern") || cell.dataset.pattern === value("pattern")),
    );
    const right = cells.some((cell) => cell.className === "right");
    const wrong = cells.some((cell) => cell.className === "wrong");
    const outcome = { "": right || wrong, right, wrong, both: right && wrong }[value("outcome")];
    return outcome && search.get(sample).includes(value("words").toLowerCase());
  };

  const filter = () => {
    let shown = 0;
    for (const sample of samples) {
      sample.hidden = !matches(sample);
      shown += sample.hidden ? 0 : 1;
    }
    form.querySelector("output").textContent = `${shown} of ${samples.length} samples`;
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
