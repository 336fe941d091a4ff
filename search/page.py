"""The look of the HTML page: its skeleton, style sheet, script and plot settings, without any of its content."""

from string import Template

# Middle tones, so that the same colours stand on a white and on a dark page.
CANDIDATE, FRONTIER, DENSE, BUDGET = "#8795a8", "#2f7fd1", "#e07b1a", "#c2455a"

# showSendToCloud: Plotly's default is a button that uploads the data.
PLOT_CONFIGURATION = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}

PLOT_LAYOUT = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 56, "r": 16, "t": 40, "b": 80},
    "font": {"size": 13},
    "legend": {"orientation": "h", "y": -0.16, "x": 0.5, "xanchor": "center"},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": CANDIDATE, "activecolor": FRONTIER},
    "hoverlabel": {"align": "left"},
    "xaxis": {"title": {"text": "MACs per image"}, "tickformat": "~s", "zeroline": False, "showline": True},
    "yaxis": {"title": {"text": "top-1 on search-validation images (%)"}, "zeroline": False},
}

# The page's colours live in its style sheet alone; the plot takes them over, again whenever the scheme changes.
RECOLOUR = """
const plot = document.getElementById("{plot_id}");
const scheme = window.matchMedia("(prefers-color-scheme: dark)");
function recolour() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  Plotly.relayout(plot, {
    "font.color": colour("--ink"), "font.family": style.fontFamily,
    "xaxis.gridcolor": colour("--line"), "yaxis.gridcolor": colour("--line"),
    "xaxis.linecolor": colour("--line"),
    "hoverlabel.bgcolor": colour("--card"), "hoverlabel.font.color": colour("--ink"),
  });
}
scheme.addEventListener("change", recolour);
recolour();
if (!document.createElement("canvas").getContext("webgl")) {
  Plotly.restyle(plot, {type: "scatter"}, [0]);  // slow to draw, but drawn
}
"""

# The policy forbids every request, whatever a string on the page might have smuggled in.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2933; --faint: #5b6673; --line: #dfe4ea; --page: #f6f7f9;
  --card: #ffffff; font-family: system-ui, "Segoe UI", Roboto, sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaef; --faint: #9aa6b4; --line: #323a45; --page: #12161b; --card: #1b2129; } }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem; line-height: 1.5;
  background: var(--page); color: var(--ink); }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem; }
.plot { height: min(70vh, 34rem); min-height: 22rem; margin-top: 1rem; }
.faint, th, dt { color: var(--faint); }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { font-weight: 600; overflow-wrap: anywhere; }
pre { margin: 0; font-size: .8rem; color: var(--faint); white-space: pre-wrap; overflow-wrap: anywhere;
  user-select: all; cursor: copy; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
tbody { border-top: 1px solid var(--line); }
th, td { padding: .45rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; }
tr + tr td { padding-top: 0; }
th { font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1.2rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  thead { display: none; }
  tbody, tr { display: block; padding: .2rem 0; }
  td { display: flex; justify-content: space-between; padding: .1rem .2rem; }
  td[data-label]::before { content: attr(data-label); color: var(--faint); }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<h1>$title</h1>
<p><b>$verdict</b></p>
<p class="faint">$dense $budget</p>
<div class="card plot">$plot</div>
<h2>Frontier</h2>
<p class="faint">Intervals are 95 % Wilson intervals of the search-validation images. A click on a command
selects the whole of it.</p>
<div class="card"><table>
<thead><tr><th>architecture and its export command</th><th>top-1</th><th>95 % interval</th><th>MACs</th>
<th>of dense</th><th>parameters</th></tr></thead>
$rows
</table></div>
<h2>Facts</h2>
<div class="card"><dl>
$facts
</dl></div>
</body>
</html>
""")
