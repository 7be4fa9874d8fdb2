"""A simulated step as one self-contained web page: timeline and memory curve, zoomed by the wheel, explained under the pointer.

A row a stage; the curve is that of the stage which was clicked, at first of the fullest, under the most that may be allocated.
Times travel as whole microseconds, memory as MiB; nothing is loaded from elsewhere. Passes narrower than a pixel share it.
"""

from __future__ import annotations

import html
import json

import numpy as np

from moeplan.cli.render import title
from moeplan.cli.render_timeline import headline, share
from moeplan.costmodels.constants import STEP
from moeplan.costmodels.pipeline.action import KINDS
from moeplan.costmodels.timeline import StepTimeline
from moeplan.planner.plan import Plan
from moeplan.units import MIB, US, format_bytes, format_seconds

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>__TITLE__</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 20px; color: #222; background: #fff }
h1 { font-size: 18px; margin: 0 } p { margin: 4px 0 } .dim { color: #666 }
canvas { display: block; width: 100%; border: 1px solid #ddd; cursor: crosshair; touch-action: none }
h2 { font-size: 14px; margin: 14px 0 4px } i { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 12px }
#tip { position: fixed; pointer-events: none; background: #fffd; border: 1px solid #888; border-radius: 4px; padding: 3px 7px;
  display: none; white-space: pre; font-size: 13px }
</style></head><body>
<h1>__TITLE__</h1><p>__SUMMARY__</p>
<p class="dim">Wheel: zoom. Drag: move. Double click: all. A click on a row shows that stage's memory.</p>
<p id="legend"></p>
<canvas id="time"></canvas>
<h2 id="which"></h2>
<canvas id="memory"></canvas>
<div id="tip"></div>
<script>
"use strict";
const D = __DATA__;
const COLOURS = {F: "#4878d0", B: "#55a868", exchange: "#e8b23a", optimizer: "#b07aa1", overhead: "#bbb"};
const WORDS = {F: "forward", B: "backward", exchange: "exposed exchange", optimizer: "optimizer", overhead: "step overhead"};
const LEFT = 52, ROW = Math.max(7, Math.min(24, Math.floor(720 / D.stages.length))), AXIS = 22;
const time = document.getElementById("time"), memory = document.getElementById("memory"), tip = document.getElementById("tip");
let from = 0, to = D.step, picked = D.fullest;
for (const s of D.stages) {  // starts and memory times were sent as differences
  let t = 0; s.start = s.start.map(d => t += d);
  t = 0; s.time = s.time.map(d => t += d);
}
document.getElementById("legend").innerHTML =
  Object.keys(WORDS).map(k => `<i style="background:${COLOURS[k]}"></i>${WORDS[k]}`).join("") +
  '<i style="border:1px solid #ddd"></i>waits<i style="height:0;border-top:2px dashed #c44;vertical-align:middle"></i>limit';
const label = us => us >= 1e6 ? (us / 1e6).toPrecision(4) + " s" : us >= 1e3 ? (us / 1e3).toPrecision(4) + " ms" : us + " us";
function round(rough) {  // the next of 1, 2, 5, 10, 20, ...
  const ten = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find(k => k * ten >= rough * 0.999999) * ten;
}
function first(list, t) {  // place of the last entry that is not after t
  let a = 0, b = list.length;
  while (a < b) { const m = (a + b) >> 1; if (list[m] <= t) a = m + 1; else b = m; }
  return Math.max(0, a - 1);
}
function prepare(canvas, height) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = height + "px"; canvas.width = width * scale; canvas.height = height * scale;
  const g = canvas.getContext("2d");
  g.scale(scale, scale); g.clearRect(0, 0, width, height); g.font = "11px system-ui, sans-serif";
  return [g, width];
}
const x = (us, width) => LEFT + (us - from) / (to - from) * (width - LEFT);
const at = (px, width) => from + (px - LEFT) / (width - LEFT) * (to - from);
function axis(g, width, y) {
  const step = round((to - from) / 8), [word, unit] = to >= 1e6 ? ["s", 1e6] : to >= 1e3 ? ["ms", 1e3] : ["us", 1];
  const digits = Math.max(0, Math.ceil(-Math.log10(step / unit) - 1e-6));
  g.fillStyle = "#666"; g.textAlign = "center";
  for (let k = Math.ceil(from / step); k * step <= to; k++) {
    const p = x(k * step, width);
    g.fillRect(p, y, 1, 4); if (p < width - 25) g.fillText((k * step / unit).toFixed(digits) + " " + word, p, y + 15);
  }
}
function drawTime() {
  const [g, width] = prepare(time, D.stages.length * ROW + AXIS);
  D.stages.forEach((s, r) => {
    const y = r * ROW;
    g.fillStyle = r === picked ? "#eef3fb" : r % 2 ? "#fafafa" : "#fff"; g.fillRect(0, y, width, ROW);
    for (const [kind, a, b] of s.frame) bar(g, width, y, a, b, COLOURS[kind]);
    let edge = -1;  // passes narrower than a pixel share it
    for (let i = first(s.start, from); i < s.start.length && s.start[i] <= to; i++) {
      const a = x(s.start[i], width), b = x(s.start[i] + s.length[i], width);
      if (b - a < 1 && Math.floor(a) === edge) continue;
      edge = Math.floor(a);
      bar(g, width, y, s.start[i], s.start[i] + s.length[i], COLOURS[s.kind[i]]);
      if (b - a > 34 && ROW >= 12) {
        g.fillStyle = "#fff"; g.textAlign = "center";
        g.fillText(name(s, i), (Math.max(a, LEFT) + Math.min(b, width)) / 2, y + ROW / 2 + 4);
      }
    }
    g.fillStyle = "#fff"; g.fillRect(0, y, LEFT - 2, ROW);
    g.fillStyle = r === picked ? "#000" : "#666"; g.textAlign = "right";
    if (ROW >= 11 || r % 4 === 0) g.fillText("stage " + r, LEFT - 6, y + ROW / 2 + 4);
  });
  axis(g, width, D.stages.length * ROW);
}
const name = (s, i) => s.kind[i] + s.batch[i] + (D.chunks > 1 ? "." + s.chunk[i] : "");
function bar(g, width, y, a, b, colour) {
  const left = Math.max(LEFT, x(a, width)), right = Math.min(width, x(b, width));
  if (right < LEFT || left > width) return;
  g.fillStyle = colour; g.fillRect(left, y + 1, Math.max(right - left - (right - left > 3 ? 1 : 0), 0.6), ROW - 2);
}
function drawMemory() {
  const height = 180, [g, width] = prepare(memory, height + AXIS), s = D.stages[picked];
  const most = Math.max(D.limit, ...D.stages.map(o => o.peak)) * 1.04, y = mib => height - mib / most * height;
  const [peak, limit, device] = [s.peak, D.limit, D.device].map(mib => (mib / 1024).toFixed(1) + " GiB");
  document.getElementById("which").textContent =
    `Memory of stage ${picked}: peak ${peak} allocated, up to ${limit} of the device's ${device} fit`;
  g.save(); g.beginPath(); g.rect(LEFT, 0, width - LEFT, height); g.clip();
  g.beginPath(); g.moveTo(LEFT, height);
  let i = first(s.time, from);
  g.lineTo(LEFT, y(s.held[i]));
  for (; i < s.time.length && s.time[i] <= to; i++) {
    const p = x(s.time[i], width);
    g.lineTo(p, y(s.held[Math.max(0, i - 1)])); g.lineTo(p, y(s.held[i]));
  }
  g.lineTo(x(Math.min(to, D.step), width), y(s.held[Math.max(0, i - 1)])); g.lineTo(x(Math.min(to, D.step), width), height);
  g.fillStyle = "#4878d033"; g.fill(); g.strokeStyle = "#4878d0"; g.stroke(); g.restore();
  g.setLineDash([5, 4]); g.strokeStyle = "#c44";
  g.beginPath(); g.moveTo(LEFT, y(D.limit)); g.lineTo(width, y(D.limit)); g.stroke();
  g.setLineDash([]); g.fillStyle = "#666"; g.textAlign = "right";
  const step = round(most / 1024 / 5);
  for (let gib = 0; gib * 1024 <= most; gib += step) {
    g.fillText(+gib.toPrecision(3) + " GiB", LEFT - 4, Math.max(9, Math.min(height - 2, y(gib * 1024) + 4)));
  }
  axis(g, width, height);
}
let asked = false;
function draw() {  // once a frame, however many events ask for it
  if (asked) return;
  asked = true; requestAnimationFrame(() => { asked = false; drawTime(); drawMemory(); });
}
function show(event, text) {
  tip.textContent = text; tip.style.display = text ? "block" : "none";
  tip.style.left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8) + "px";
}
let held = null, moved = false;
for (const canvas of [time, memory]) {
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const here = at(event.offsetX, canvas.clientWidth), factor = Math.exp(event.deltaY * 0.0015);
    const span = Math.min(D.step, Math.max(20, (to - from) * factor));
    from = Math.max(0, Math.min(D.step - span, here - (here - from) / (to - from) * span)); to = from + span; draw();
  }, {passive: false});
  canvas.addEventListener("pointerdown", event => {
    held = [event.clientX, from, to]; moved = false; canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", event => {
    held = null; const row = Math.floor(event.offsetY / ROW);
    if (!moved && canvas === time && row < D.stages.length) { picked = row; draw(); }
  });
  canvas.addEventListener("pointercancel", () => { held = null; });
  canvas.addEventListener("pointerleave", event => show(event, ""));
  canvas.addEventListener("dblclick", () => { from = 0; to = D.step; draw(); });
  canvas.addEventListener("pointermove", event => {
    if (held) {
      moved = moved || Math.abs(event.clientX - held[0]) > 3;
      const shift = (held[0] - event.clientX) / (canvas.clientWidth - LEFT) * (held[2] - held[1]);
      from = Math.max(0, Math.min(D.step - held[2] + held[1], held[1] + shift)); to = from + held[2] - held[1]; draw(); return;
    }
    const t = at(event.offsetX, canvas.clientWidth);
    if (t < from || t > to) return show(event, "");
    if (canvas === memory) {
      const s = D.stages[picked], gib = s.held[first(s.time, t)] / 1024;
      return show(event, `${label(Math.round(t))}: ${gib.toFixed(2)} GiB`);
    }
    const r = Math.floor(event.offsetY / ROW), s = D.stages[r];
    if (!s) return show(event, "");
    const f = s.frame.find(([, a, b]) => t >= a && t < b), i = first(s.start, t);
    const inside = t >= s.start[i] && t < s.start[i] + s.length[i];
    if (inside) return show(event, `stage ${r}: ${WORDS[s.kind[i]]} of micro-batch ${s.batch[i]}, chunk ${s.chunk[i]}\\n` +
      `${label(s.start[i])} + ${label(s.length[i])}`);
    show(event, f ? `stage ${r}: ${WORDS[f[0]]}\\n${label(f[1])} + ${label(f[2] - f[1])}` : `stage ${r} waits`);
  });
}
window.addEventListener("resize", draw);
draw();
</script></body></html>
"""


def timeline_page(plan: Plan, timeline: StepTimeline) -> str:
    """The page."""
    fullest = int(np.argmax(timeline.peak_bytes))
    data = {
        "step": _us(timeline.step_s),
        "chunks": plan.layout.vpp,
        "fullest": fullest,
        "device": round(plan.problem.device_bytes / MIB, 1),
        "limit": round(plan.problem.peak_limit_bytes / MIB, 1),
        "stages": [_stage(timeline, rank) for rank in range(timeline.ranks)],
    }
    summary = (
        f"{headline(plan, timeline)}. "
        f"Step {format_seconds(timeline.step_s)} simulated, {format_seconds(timeline.priced_s)} by its price "
        f"({share(timeline.step_s / timeline.priced_s - 1.0, 3):+.1%}); "
        f"stages wait {share(timeline.bubble_share, 3):.1%} of their time; "
        f"peak {format_bytes(float(timeline.peak_bytes[fullest]))} on stage {fullest}."
    )
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = _PAGE.replace("__TITLE__", html.escape(title(plan))).replace("__SUMMARY__", html.escape(summary))
    return page.replace("__DATA__", text)


def _stage(timeline: StepTimeline, rank: int) -> dict[str, object]:
    """Passes, frame and memory curve of a stage; times as differences."""
    passes, here, frame = timeline.passes, timeline.passes.of_rank(rank), timeline.frame
    start, end = np.rint(passes.start_s[here] / US).astype(int), np.rint(passes.end_s[here] / US).astype(int)
    time_s, held = timeline.memory(rank)
    time = np.rint(time_s / US).astype(int)
    done, update = float(timeline.ends_s[rank]), timeline.update_s
    around = [
        ("exchange", 0.0, float(frame.gather_s[rank])),
        ("exchange", done - float(frame.scatter_s[rank]), done),
        ("optimizer", update, update + float(frame.optimizer_s[rank])),
        ("overhead", timeline.step_s - STEP.overhead_s, timeline.step_s),
    ]
    return {
        "kind": "".join(KINDS[k] for k in passes.kind[here].tolist()),
        "batch": passes.batch[here].tolist(),
        "chunk": passes.chunk[here].tolist(),
        "start": np.diff(start, prepend=0).tolist(),
        "length": (end - start).tolist(),
        "frame": [(kind, _us(a), _us(b)) for kind, a, b in around if b > a],
        "time": np.diff(time, prepend=0).tolist(),
        "held": np.round(held / MIB, 1).tolist(),
        "peak": round(float(timeline.peak_bytes[rank]) / MIB, 1),
    }


def _us(seconds: float) -> int:
    return round(seconds / US)
