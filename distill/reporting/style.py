"""The style sheet of every page: light and dark by the reader's preference, narrow and wide screens, print."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --card: #f5f6f8; --ink: #1a1d21; --soft: #565d67; --line: #d9dde3; --grid: #e6e9ed;
  --good: #0b6b3a; --bad: #b3261e; --open: #8a5200; --accent: #1f5fa8;
  --teacher: #2f6fb5; --student: #2f9e6e; --wait: #e6a11c; --idle: #dde1e6; --send: #a05bb5; --receive: #4fb3d9;
  --ledger: #c8553d; --predicted: #9aa3ae; --c0: oklch(62% .16 40); --c1: oklch(62% .16 330);
  --shade: 70%; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #131619; --card: #1c2024; --ink: #e8eaed; --soft: #a5adb7; --line: #363c43; --grid: #282d33;
  --good: #6fd39c; --bad: #ff8f85; --open: #f0b45c; --accent: #8bbcf2;
  --teacher: #5b9be0; --student: #45bd8a; --wait: #e8b04a; --idle: #343a41; --send: #c083d4; --receive: #6cc6ea;
  --ledger: #e37b64; --predicted: #7c8590; --c0: oklch(68% .16 40); --c1: oklch(68% .16 330);
  --shade: 60%; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; }
main.broad { max-width: 96rem; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem .9rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .25rem; } h3 { font-size: .95rem; margin: 1rem 0 .25rem; }
section { margin-top: 2.75rem; border-top: 1px solid var(--line); padding-top: 1.1rem; }
p { margin: .4rem 0; } .lead { font-size: 1.08rem; max-width: 56rem; margin: .7rem 0 1.2rem; }
.origin { color: var(--soft); font-size: .9rem; display: flex; flex-wrap: wrap; gap: 0 1.4rem; }
.note { color: var(--soft); font-size: .9rem; margin: 0 0 .9rem; max-width: 56rem; }
.state { margin: 0; padding: .1rem .7rem; border: 1.5px solid; border-radius: 1rem;
  font-size: .88rem; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.7rem, 1fr)); gap: .7rem; }
.tile { background: var(--card); border-radius: .6rem; margin: 0; padding: .7rem .9rem; }
.tile dt { color: var(--soft); font-size: .85rem; } .tile dd { margin: 0; font-size: .88rem; color: var(--soft); }
.tile .figure { font-size: 1.5rem; line-height: 1.3; font-weight: 650; color: var(--ink);
  font-variant-numeric: tabular-nums; }
.tile .change { color: var(--accent); font-weight: 600; } .tile .worse { color: var(--bad); }
.strip { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .4rem;
  padding: 0; margin: 1.1rem 0 0; }
.strip li { padding: .35rem .6rem .5rem; border-left: 3px solid var(--line); font-size: .88rem; }
.strip li b, .strip li span { display: block; } .strip li span { color: var(--soft); }
.strip li svg.bar { height: 5px; margin-top: .3rem; min-width: 0; }
.strip .done { border-color: var(--good); } .strip .failed { border-color: var(--bad); }
.strip .failed span { color: var(--bad); } .strip .open { border-color: var(--open); color: inherit; }
.strip .open span { color: var(--open); }
.scroll { overflow-x: auto; margin: .6rem 0; } .tall { max-height: 34rem; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; background: var(--paper); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; min-width: min(100%, 26rem); }
th, td { padding: .28rem 1.1rem .28rem 0; text-align: right; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: pre; vertical-align: bottom; }
.word { text-align: left; } td:first-child { font-weight: 500; }
td.word { white-space: normal; min-width: 8.5rem; overflow-wrap: anywhere; }
td.long { min-width: 15rem; overflow-wrap: normal; }
@media (min-width: 40rem) { td.word:first-child { white-space: nowrap; }
  .broad th:first-child, .broad td:first-child { position: sticky; left: 0; background: var(--paper); }
  .broad table { font-size: .88rem; } .broad th, .broad td { padding-right: .9rem; } }
@media (max-width: 40rem) { table { font-size: .84rem; } th, td { padding-right: .7rem; }
  td.word { min-width: 6.4rem; } }
a { color: var(--accent); }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; overflow: auto; max-height: 34rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: .4rem 0; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; padding: .3rem 0; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .88rem; color: var(--soft); }
figcaption b { color: var(--ink); } .small-multiples figcaption b { display: block; overflow-wrap: anywhere; }
figcaption strong { color: var(--bad); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 2.5rem;
  margin-top: 1.3rem; }
.small-multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.3rem, 1fr)); gap: 1.1rem 1rem;
  margin-top: 1.3rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: .3rem 0 .8rem;
  font-size: .88rem; color: var(--soft); }
.legend li { display: flex; align-items: center; gap: .4rem; }
.legend i { width: .85rem; height: .85rem; border-radius: 2px; flex: none; background: currentColor; }
.line { --hue: color-mix(in oklch longer hue, var(--c1) var(--p), var(--c0));
  --own: color-mix(in oklab, var(--hue) var(--share, 100%), var(--ink)); }
.legend i.unrecorded { background: none; border: 1px dashed var(--soft); }
.shaded { --share: var(--shade); } .d1 { stroke-dasharray: 8 3; } .d2 { stroke-dasharray: 2 2.5; }
.d3 { stroke-dasharray: 9 3 2 3; }
.legend.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); max-height: 15rem;
  overflow-y: auto; }
.legend.many li { overflow-wrap: anywhere; } svg.sample { width: 26px; height: 10px; flex: none; }
.sample path.line { stroke-width: 2.2; }
.legend button, th button { all: unset; cursor: pointer; display: inline-flex; align-items: center; gap: .4rem; }
th button { display: inline; white-space: pre; }
.legend button:hover, .legend [aria-pressed="true"], th button:hover, [aria-sort] button { color: var(--ink);
  text-decoration: underline; text-underline-offset: .2em; }
:is(.legend, th) button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
[aria-sort="ascending"] button::after { content: " \\2191"; } [aria-sort="descending"] button::after {
  content: " \\2193"; }
.dim { stroke-opacity: .13; fill-opacity: .13; }
.tip { position: fixed; z-index: 1; pointer-events: none; visibility: hidden; max-width: min(26rem, 90vw);
  background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .35rem .6rem;
  font-size: .82rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tip.shown { visibility: visible; } .tip p { margin: 0; display: flex; gap: 1rem; justify-content: space-between;
  overflow-wrap: anywhere; } .tip b { white-space: nowrap; }
@media (min-width: 40rem) { .tip:has(p:nth-child(14)) { columns: 2; column-gap: 1.4rem; } }
.tip .nearest { color: var(--accent); font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: 1.4rem 0 0; font-size: .9rem; }
.chart { padding: 0 .9rem 0 4.2rem; margin: .3rem 0 0; }
.chart .ytitle { margin-left: -4.2rem; font-size: .8rem; color: var(--soft); min-height: .6rem;
  padding-bottom: .45rem; }
svg.plot { display: block; width: 100%; overflow: visible; margin-bottom: 2.9rem; }
svg.plot:not(.lanes) { height: 11rem; }
.wide svg.plot:not(.lanes) { height: 19rem; }
.small-multiples svg.plot:not(.lanes) { height: 6.2rem; margin-bottom: 1.6rem; }
.small-multiples .chart { padding: 0 .5rem 0 2.9rem; }
svg.lanes { margin-top: .6rem; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.y { text-anchor: end; } svg text.x { text-anchor: middle; } svg text.title { text-anchor: end; }
svg text.small { font-size: 11px; } svg text.mark { fill: var(--ink); }
svg .grid { stroke: var(--grid); } svg .axis, svg .tick { stroke: var(--soft); stroke-opacity: .6; }
svg.marks { overflow: hidden; width: 100%; } .chart svg.marks * { vector-effect: non-scaling-stroke; }
path.line { fill: none; vector-effect: non-scaling-stroke;
  stroke: var(--own); stroke-width: 1.6; stroke-linejoin: round; }
path.solo { stroke: var(--accent); } .dot { fill: var(--accent); }
svg.bar { display: block; width: 100%; min-width: 9rem; height: 14px; border-radius: 3px; }
.two svg.bar { height: 7px; } .two svg.bar + svg.bar { margin-top: 1px; }
td svg.bar { width: 11rem; max-width: 40vw; } .track { fill: var(--grid); }
.lane { fill: none; stroke: var(--line); stroke-dasharray: 2 3; }
.k { stroke: none; } .lanes .k { stroke: var(--paper); stroke-width: .6; }
.teacher { fill: var(--teacher); color: var(--teacher); } .student { fill: var(--student); color: var(--student); }
.wait { fill: var(--wait); color: var(--wait); } .idle { fill: var(--idle); color: var(--idle); }
.send { fill: var(--send); color: var(--send); } .receive { fill: var(--receive); color: var(--receive); }
.ledger { fill: var(--ledger); color: var(--ledger); } .predicted { fill: var(--predicted); color: var(--predicted); }
.gpu { fill: var(--student); color: var(--student); } .cpu { fill: var(--teacher); color: var(--teacher); }
rect.stage { fill: var(--accent); } rect.unrecorded { fill: var(--paper); }
circle.run { fill: var(--student); stroke: var(--paper); stroke-width: 1.5; }
circle.beaten { fill: var(--paper); stroke: var(--student); stroke-width: 2; }
circle.kept { fill: none; stroke: var(--accent); stroke-width: 2; }
path.front { fill: none; stroke: var(--student); stroke-width: 1.4; stroke-dasharray: 5 4; }
circle.reference { fill: var(--paper); stroke: var(--teacher); stroke-width: 2; }
line.ideal { stroke: var(--soft); stroke-dasharray: 4 4; }
@media print { .tall, pre, .legend.many { max-height: none; } nav, .tip { display: none; } }
""" + "".join(f".p{percent} {{ --p: {percent}%; }}\n" for percent in range(101))  # along the hues of lines
