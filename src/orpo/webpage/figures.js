(function () {
  "use strict";
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var root = document.documentElement;

  // "var(--name)" becomes the colour of that name in the page's present theme; everything else stays as it is.
  function coloured(value, style) {
    if (typeof value === "string") {
      var found = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return found ? style.getPropertyValue(found[1]).trim() || value : value;
    }
    if (Array.isArray(value)) { return value.map(function (item) { return coloured(item, style); }); }
    if (value !== null && typeof value === "object") {
      var copy = {};
      Object.keys(value).forEach(function (key) { copy[key] = coloured(value[key], style); });
      return copy;
    }
    return value;
  }

  function isPlain(value) { return value !== null && typeof value === "object" && !Array.isArray(value); }

  function merged(base, over) {
    var result = Object.assign({}, base);
    Object.keys(over).forEach(function (key) {
      result[key] = isPlain(result[key]) && isPlain(over[key]) ? merged(result[key], over[key]) : over[key];
    });
    return result;
  }

  function shared() {
    var axis = { gridcolor: "var(--grid)", zerolinecolor: "var(--rule)", linecolor: "var(--rule)", automargin: true, fixedrange: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 300, margin: { l: 48, r: 14, t: 12, b: 42 },
      font: { color: "var(--ink)", size: 12, family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, hovermode: "closest",
      hoverlabel: { bgcolor: "var(--card)", bordercolor: "var(--rule)", font: { color: "var(--ink)" } },
      xaxis: axis, yaxis: axis,
      polar: { bgcolor: "rgba(0,0,0,0)", radialaxis: axis, angularaxis: { gridcolor: "var(--grid)", linecolor: "var(--rule)" } }
    };
  }

  function draw(width) {
    var style = getComputedStyle(root);
    Object.keys(figures).forEach(function (name) {
      var place = document.getElementById("figure-" + name);
      if (!place) { return; }
      var layout = coloured(merged(shared(), figures[name].layout), style);
      if (width) { layout.width = width; }
      Plotly.react(place, coloured(figures[name].traces, style), layout, { displayModeBar: false, responsive: !width });
    });
  }

  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () { draw(); });
  // Paper is white and narrow, whatever the screen is.
  window.addEventListener("beforeprint", function () { root.classList.add("light"); draw(640); });
  window.addEventListener("afterprint", function () { root.classList.remove("light"); draw(); });
  // A figure inside a closed <details> had no width when it was drawn.
  document.addEventListener("toggle", function (event) {
    event.target.querySelectorAll(".plot").forEach(function (place) { Plotly.Plots.resize(place); });
  }, true);
}());
