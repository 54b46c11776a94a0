"""Style sheet and script of the page; both are put into it, nothing is loaded from anywhere."""

STYLE = """
:root{color-scheme:light dark;
--bg:#f4f6f9;--card:#fff;--text:#17202c;--soft:#566173;--rule:#dbe1e9;--grid:#e7ebf1;
--blue:#1d5fd1;--blue-soft:#1d5fd126;--faint:#9db7e3;--orange:#b04a00;--teal:#0d7a70;
--good:#176b36;--good-bg:#dff3e4;--mid:#7a4a00;--mid-bg:#fff1d6;--bad:#a3171b;--bad-bg:#fde4e4;
--stop:#1b4f9c;--stop-bg:#e0ebfc;
--p-data:#56637a;--p-forward:#1d5fd1;--p-backward:#5b92ea;--p-update:#0d7a70;
--p-communication:#2f9c8f;--p-settle:#a63d00;--p-clip:#d26c0e;--p-noise:#c2185b;
--p-select:#7a5c00;--p-ledger:#8e4ec6;--p-other:#8a95a5}
@media (prefers-color-scheme:dark){:root{
--bg:#0e131a;--card:#171e28;--text:#e7ecf3;--soft:#a0adbe;--rule:#2c3744;--grid:#242e3a;
--blue:#74abff;--blue-soft:#74abff2e;--faint:#41618f;--orange:#f5a556;--teal:#46c7b6;
--good:#86dba2;--good-bg:#143021;--mid:#f3c67a;--mid-bg:#33270f;--bad:#ff9d98;--bad-bg:#421a1c;
--stop:#9cc3ff;--stop-bg:#162c4c;
--p-data:#a3b0c2;--p-forward:#4f8ff5;--p-backward:#93bcfb;--p-update:#23a596;
--p-communication:#7fdccf;--p-settle:#d9692b;--p-clip:#f7b267;--p-noise:#f0679b;
--p-select:#d8bf6a;--p-ledger:#b98aea;--p-other:#697585}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1220px;margin:0 auto;padding:28px 20px 56px}
h1,h2,h3,p,dl,dd,figure{margin:0}
h1{font-size:28px;line-height:1.25;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:34px 0 12px;letter-spacing:-.005em}
h3{font-size:15px;line-height:1.35}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.kind{color:var(--soft);font-size:13px;font-weight:600;letter-spacing:.06em;
text-transform:uppercase}
.status{display:inline-block;vertical-align:middle;margin-left:6px;padding:3px 11px;
border-radius:99px;font-size:13px;font-weight:650;letter-spacing:0}
.good{color:var(--good);background:var(--good-bg)}.mid{color:var(--mid);background:var(--mid-bg)}
.bad{color:var(--bad);background:var(--bad-bg)}.stop{color:var(--stop);background:var(--stop-bg)}
.facts{display:flex;flex-wrap:wrap;gap:2px 20px;margin-top:8px;color:var(--soft)}
.facts b{color:var(--text);font-weight:600;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:14px 0 18px;font-size:14px}
nav a,a{color:var(--blue);text-decoration:none}nav a:hover{text-decoration:underline}
a:focus-visible,summary:focus-visible,.scroll:focus-visible,pre:focus-visible{
outline:2px solid var(--blue);outline-offset:2px;border-radius:4px}
.alert{padding:11px 15px;border-radius:9px;margin-bottom:10px}
.alert.bad{border:2px solid var(--bad)}.alert.bad strong{font-size:18px;display:block}
.tiles{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:12px;margin-top:18px}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:11px}
.tile{padding:13px 16px 11px}
.tile dt{color:var(--soft);font-size:13px;line-height:1.3}
.tile dd{font-size:25px;font-weight:650;line-height:1.3;letter-spacing:-.01em;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile dd.sub{font-size:13px;font-weight:400;color:var(--soft);letter-spacing:0;min-height:1.3em}
.card{padding:18px 20px}
.split{display:grid;grid-template-columns:minmax(0,1.1fr) minmax(0,1fr);gap:20px 40px}
.even{grid-template-columns:repeat(2,minmax(0,1fr))}
.prose{max-width:68ch;overflow-wrap:anywhere}.prose p+p{margin-top:.75em}
.prose h3{margin:1.2em 0 .4em}.prose ul{margin:0;padding-left:1.2em}.prose li+li{margin-top:.35em}
.facts-list>div{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,3fr);gap:14px;
padding:6px 0;border-bottom:1px solid var(--grid)}
.facts-list>div:last-child{border-bottom:0}
.facts-list dt{color:var(--soft)}
.facts-list dd{font-weight:550;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.meter{display:block;width:100%;height:6px;margin:5px 0 3px;border-radius:3px}
.track{fill:var(--rule)}.fill.main{fill:var(--blue)}.fill.bad{fill:var(--bad)}
.lead{color:var(--soft);margin:-6px 0 12px;max-width:110ch}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:12px}
.chart{position:relative;padding:14px 14px 12px;display:flex;flex-direction:column}
.chart figcaption{display:flex;justify-content:space-between;align-items:baseline;gap:10px}
.latest{font-weight:650;font-variant-numeric:tabular-nums;white-space:nowrap}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;font-size:12.5px;color:var(--soft)}
.key{display:inline-block;width:13px;height:3px;margin-right:6px;vertical-align:middle;
border-radius:1px;background:var(--blue)}
.key.faint{background:var(--faint)}.key.second{background:var(--teal)}
.key.band{height:10px;background:var(--blue-soft)}
.plot{display:block;width:100%;height:auto;margin:auto 0 4px;overflow:visible;
touch-action:pan-y;font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
.note{color:var(--soft);font-size:12.5px;line-height:1.4;min-height:2.8em}
.after{margin-top:10px}
.warn{color:var(--mid);font-size:12.5px;line-height:1.4}
.tick{fill:var(--soft)}.grid{stroke:var(--grid);stroke-width:1}.axis{stroke:var(--soft)}
.line{fill:none;stroke:var(--blue);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke:var(--faint);stroke-width:.8}
.line.second{stroke:var(--teal);stroke-width:1.2}
.dot{fill:var(--blue)}.band{fill:var(--blue-soft)}
.reference{stroke:var(--orange);stroke-width:1.4;stroke-dasharray:5 4}
.label{fill:var(--orange);font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:3.5px;
stroke-linejoin:round}
.cross{stroke:var(--soft);stroke-width:1}.mark{stroke:var(--card);stroke-width:1.5;fill:var(--blue)}
.mark.second{fill:var(--teal)}.mark.faint{fill:var(--faint)}
.tip{position:absolute;z-index:2;pointer-events:none;padding:6px 10px;border-radius:7px;
background:var(--text);color:var(--card);font-size:12.5px;line-height:1.45;white-space:nowrap;
font-variant-numeric:tabular-nums}
.barhead{display:flex;justify-content:space-between;margin-bottom:6px}
.barhead span{font-variant-numeric:tabular-nums}
.bar{display:block;width:100%;height:40px;border-radius:6px}
.groups{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px 40px;margin-top:14px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:550}
.phases{align-self:start}.phases td{text-align:right;white-space:nowrap;padding:4px 0 4px 12px}
.phases th{padding:4px 0;font-weight:500}.phases small{color:var(--soft);font-size:12.5px}
.phases thead th,.phases thead td{font-weight:650;border-bottom:1px solid var(--rule)}
.phases .key{width:11px;height:11px;border-radius:3px;margin-right:9px;vertical-align:-1px}
.scroll{overflow:auto;max-height:480px;margin:-6px 0}
.scroll th,.scroll td{padding:6px 18px 6px 0;white-space:nowrap;border-bottom:1px solid var(--grid)}
.scroll thead th{position:sticky;top:0;background:var(--card);color:var(--soft);
box-shadow:0 1px 0 var(--rule)}
.scroll tfoot th,.scroll tfoot td{font-weight:650;border-bottom:0}
.num{text-align:right}.scroll th.num{text-align:right}.scroll td.num:last-child{padding-right:4px}
summary{cursor:pointer;font-weight:550}
pre{margin:14px 0 0;overflow:auto;max-height:560px;font-size:13px;line-height:1.5;tab-size:2}
.quiet{color:var(--soft)}
footer{margin-top:34px;color:var(--soft);font-size:13px}
@media (max-width:820px){.split,.even,.groups{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media (max-width:480px){main{padding:18px 12px 40px}h1{font-size:23px}
.tiles{gap:8px}.tile{padding:10px 12px}.tile dd{font-size:20px}.card{padding:14px}
.chart{padding:12px 10px 10px}.phases small{display:block;margin-left:20px}.note{min-height:0}}
@media print{:root{color-scheme:light}body{background:#fff}nav{display:none}
.card,.tile,.alert{break-inside:avoid}.scroll,pre{max-height:none}}
"""

STYLE_PHASES = "".join(
    f".key.p-{name}{{background:var(--p-{name})}}.phase.p-{name}{{fill:var(--p-{name})}}"
    for name in (
        "data",
        "forward",
        "backward",
        "update",
        "communication",
        "settle",
        "clip",
        "select",
        "noise",
        "ledger",
        "other",
    )
)

# Values under the pointer. Without it the page lacks nothing else. Only textContent is ever set,
# so a name from a configuration cannot become markup here.
SCRIPT = """
for (const svg of document.querySelectorAll("svg.plot")) {
  const plot = JSON.parse(svg.dataset.plot), box = svg.parentNode;
  const [x0, x1, left, right] = plot.x, [y0, y1, bottom, top] = plot.y;
  const f = plot.log ? Math.log : v => v;
  const px = x => left + (right - left) * (x - x0) / (x1 - x0);
  const py = y => bottom - (bottom - top) *
    (f(Math.min(Math.max(y, y0), y1)) - f(y0)) / (f(y1) - f(y0));
  const text = v => plot.pct ? (100 * v).toFixed(1) + " %" :
    Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toPrecision(3) : String(+v.toPrecision(4));
  const layer = document.createElementNS("http://www.w3.org/2000/svg", "g");
  const tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true;
  svg.append(layer); box.append(tip);
  const add = (kind, set) => {
    const e = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const k in set) e.setAttribute(k, set[k]);
    layer.append(e);
  };
  const nearest = (p, x) => {
    let a = 0, b = p.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (p[m][0] <= x) a = m; else b = m; }
    return x - p[a][0] <= p[b][0] - x ? p[a] : p[b];
  };
  const hide = () => { layer.replaceChildren(); tip.hidden = true; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const r = svg.getBoundingClientRect(), scale = r.width / svg.viewBox.baseVal.width;
    const u = Math.min(Math.max((event.clientX - r.left) / scale, left), right);
    const at = x0 + (x1 - x0) * (u - left) / (right - left);
    const found = plot.series.map(s => [s, nearest(s.p, at)]);
    if (!found.length) return;
    hide();
    const last = found[found.length - 1][1];
    found.sort((a, b) => b[1][1] - a[1][1]);
    add("line", {class: "cross", x1: px(last[0]), x2: px(last[0]), y1: top, y2: bottom});
    const lines = ["step " + last[0].toLocaleString("en")];
    for (const [s, [x, y]] of found) {
      add("circle", {class: "mark " + s.s, cx: px(x), cy: py(y), r: 3.6});
      lines.push(s.n + ": " + text(y));
    }
    tip.replaceChildren(...lines.map(line => {
      const e = document.createElement("div"); e.textContent = line; return e;
    }));
    tip.hidden = false;
    const b = box.getBoundingClientRect(), x = px(last[0]) * scale + r.left - b.left;
    const side = x + tip.offsetWidth + 18 > b.width ? x - tip.offsetWidth - 12 : x + 12;
    tip.style.left = Math.max(4, side) + "px";
    tip.style.top = r.top - b.top + 8 + "px";
  });
}
"""
