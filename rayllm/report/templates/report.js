// One cursor for all charts of a stage: prints the values at the nearest logged step beside each title.
for (const group of document.querySelectorAll("[data-group]")) {
  const charts = [...group.querySelectorAll(".panel")].map((panel) => {
    const svg = panel.querySelector("svg"), data = svg.dataset;
    const lines = [...svg.querySelectorAll("[data-x]")].map((path) => ({
      x: path.dataset.x.split(" ").map(Number), y: path.dataset.y.split("|"),
    }));
    const outputs = [...panel.querySelectorAll("output")];
    return { svg, lines, outputs, cursor: svg.querySelector(".cursor"), last: outputs.map((o) => o.textContent),
             left: +data.left, right: +data.right, low: +data.low, high: +data.high };
  });
  const steps = group.querySelectorAll(".at");
  const nearest = (xs, x) => xs.reduce((best, value, i) => Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best, 0);
  const show = (x) => {
    for (const chart of charts) {
      chart.lines.forEach((line, i) => { chart.outputs[i].textContent = line.y[nearest(line.x, x)]; });
      const span = chart.high - chart.low || 1;
      const at = chart.left + (x - chart.low) / span * (chart.right - chart.left);
      chart.cursor.setAttribute("x1", at);
      chart.cursor.setAttribute("x2", at);
    }
    steps.forEach((label) => { label.textContent = "step " + x; });
    group.classList.add("active");
  };
  const hide = () => {
    for (const chart of charts) chart.outputs.forEach((output, i) => { output.textContent = chart.last[i]; });
    steps.forEach((label) => { label.textContent = ""; });
    group.classList.remove("active");
  };
  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", (event) => {
      const box = chart.svg.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * chart.svg.viewBox.baseVal.width;
      const x = chart.low + (at - chart.left) / (chart.right - chart.left) * (chart.high - chart.low);
      const steps = chart.lines[0].x;
      show(steps[nearest(steps, x)]);
    });
    chart.svg.addEventListener("pointerleave", hide);
  }
}
