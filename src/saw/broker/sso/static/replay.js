// Plays a recording in xterm.js: an asciicast (version 2) that is read as it is played, so that a long one needs no memory.
'use strict';

const form = document.getElementById('play');
const box = document.getElementById('screen');
const said = document.getElementById('said');
const controls = document.getElementById('controls');
const toggle = document.getElementById('toggle');
const speed = document.getElementById('speed');
const clock = document.getElementById('clock');
const LONGEST_PAUSE = 2;

let playing = null;

function say(text, bad) {
  said.className = bad ? 'bad' : '';
  said.textContent = text;
}

const time = (seconds) => {
  const whole = Math.floor(seconds);
  const two = (number) => String(number).padStart(2, '0');
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
};

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split('\n');
      rest = parts.pop();
      yield* parts;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  // The broker ends a recording with an end of line; what comes without one was cut off.
  if (rest) throw new Error('the recording was cut off on its way');
}

class Player {
  constructor() {
    this.paused = false;
    this.stopped = false;
    this.wake = () => {};
  }

  nudge() { this.wake(); }

  // Waits as long as the session did, at the chosen speed, but not through long pauses.
  async pause(seconds) {
    let left = Math.min(seconds, LONGEST_PAUSE) * 1000;
    while (!this.stopped && (this.paused || left > 0)) {
      const pace = Number(speed.value);
      if (!this.paused && !pace) return;
      const from = performance.now();
      await new Promise((resolve) => {
        this.wake = resolve;
        if (!this.paused) setTimeout(resolve, left / pace);
      });
      if (!this.paused) left -= (performance.now() - from) * pace;
    }
  }

  async play(body) {
    const events = lines(body);
    const head = JSON.parse((await events.next()).value);
    const terminal = new Terminal({ ...window.emulatorOptions, cols: head.width, rows: head.height, disableStdin: true });
    this.terminal = terminal;
    terminal.open(box);
    const write = (text) => new Promise((resolve) => { terminal.write(text, resolve); });
    let at = 0;
    for await (const line of events) {
      if (this.stopped) return;
      const [when, kind, data] = JSON.parse(line);
      await this.pause(when - at);
      at = when;
      clock.textContent = time(at);
      if (kind === 'o') await write(data);
      if (kind === 'r') terminal.resize(...data.split('x').map(Number));
      if (kind === 'm') say(`${time(at)} ${data}`);
    }
  }

  stop() {
    this.stopped = true;
    this.wake();
    if (this.terminal) this.terminal.dispose();
  }
}

async function start() {
  if (playing) playing.stop();
  const mine = new Player();
  playing = mine;
  say('The broker verifies the recording …');
  const answer = await fetch(form.dataset.recording, {
    method: 'POST',
    headers: { 'x-csrf-token': document.querySelector('meta[name=csrf]').content },
  });
  if (!answer.ok || !answer.headers.get('content-type').startsWith('application/x-asciicast')) {
    throw new Error('the broker did not hand it out. Load the page again; it then says why');
  }
  if (mine !== playing) return;
  say('');
  controls.hidden = false;
  toggle.disabled = false;
  toggle.textContent = 'Pause';
  await mine.play(answer.body);
  if (mine !== playing || mine.stopped) return;
  toggle.disabled = true;
  say(`It ends here. ${said.textContent}`);
}

toggle.addEventListener('click', () => {
  playing.paused = !playing.paused;
  toggle.textContent = playing.paused ? 'Go on' : 'Pause';
  playing.nudge();
});
speed.addEventListener('change', () => { if (playing) playing.nudge(); });
form.addEventListener('submit', (event) => {
  event.preventDefault();
  start().catch((error) => say(`It cannot be played: ${error.message}.`, true));
});
if (window.Terminal) form.hidden = false;
else say('The files of the player are missing on the broker\'s host. Download the recording, and tell the platform team.', true);
