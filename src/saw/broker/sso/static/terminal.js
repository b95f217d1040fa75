// The terminal of a workspace: xterm.js at one end of a WebSocket. What the workspace sends is only ever written to xterm.
'use strict';

const CHUNK = 16384;
const CONFIRM = 32768;
const box = document.getElementById('screen');
const said = document.getElementById('said');
const again = document.getElementById('again');
const leave = document.getElementById('close');
const csrf = document.querySelector('meta[name=csrf]').content;
const place = `/workspaces/${encodeURIComponent(box.dataset.workspace)}/terminal`;

let socket = null;
let terminal = null;
let watch = null;

function say(text, bad) {
  said.className = bad ? 'bad' : '';
  said.textContent = text;
}

function refuse(told) {
  say(told.cure ? `${told.message}. What helps: ${told.cure}.` : told.message, true);
}

function over() {
  socket = null;
  again.hidden = false;
  leave.hidden = true;
  if (terminal) terminal.options.disableStdin = true;
}

async function ticket() {
  const answer = await fetch(place, { method: 'POST', headers: { 'x-csrf-token': csrf } });
  const told = await answer.json();
  if (answer.ok) return told.ticket;
  refuse(told);
  if (answer.status === 401) {
    const link = document.createElement('a');
    link.href = `/login?to=${encodeURIComponent(location.pathname)}`;
    link.textContent = ' Sign in';
    said.append(link);
  }
  return null;
}

function show() {
  if (terminal) {
    watch.disconnect();
    terminal.dispose();
  }
  terminal = new Terminal(window.emulatorOptions);
  const fit = new FitAddon.FitAddon();
  terminal.loadAddon(fit);
  terminal.open(box);
  fit.fit();
  watch = new ResizeObserver(() => fit.fit());
  watch.observe(box);
  // Otherwise nobody gets out of it without a mouse.
  terminal.attachCustomKeyEventHandler((event) => {
    if (event.key !== 'Escape' || !event.shiftKey) return true;
    if (event.type === 'keydown') (leave.hidden ? again : leave).focus();
    return false;
  });
  return terminal;
}

function connect(secret) {
  const shown = show();
  const mine = new WebSocket(`wss://${location.host}${place}/connection`, [box.dataset.protocol, secret]);
  let unconfirmed = 0;
  let told = false;
  const open = () => mine.readyState === WebSocket.OPEN;
  const size = ({ cols, rows }) => { if (open()) mine.send(JSON.stringify({ size: { columns: cols, rows } })); };
  const type = (bytes) => {
    for (let at = 0; open() && at < bytes.length; at += CHUNK) mine.send(bytes.subarray(at, at + CHUNK));
  };
  socket = mine;
  mine.binaryType = 'arraybuffer';
  mine.onopen = () => size(shown);
  shown.onResize(size);
  shown.onData((text) => type(new TextEncoder().encode(text)));
  shown.onBinary((text) => type(Uint8Array.from(text, (letter) => letter.charCodeAt(0))));
  mine.onmessage = (event) => {
    if (typeof event.data !== 'string') {
      const bytes = new Uint8Array(event.data);
      shown.write(bytes, () => {
        unconfirmed += bytes.length;
        if (unconfirmed < CONFIRM || !open()) return;
        mine.send(JSON.stringify({ shown: unconfirmed }));
        unconfirmed = 0;
      });
      return;
    }
    const news = JSON.parse(event.data);
    if (news.opened) {
      say(`Session ${news.opened.session}`);
      leave.hidden = false;
      shown.focus();
    } else if (news.refused) {
      told = true;
      refuse(news.refused);
      over();
    } else if (news.ended) {
      told = true;
      say(`It has ended (${news.ended.reason}). ${news.ended.message} `, news.ended.reason !== 'closed');
      const link = document.createElement('a');
      link.href = `/sessions/${encodeURIComponent(news.ended.session)}`;
      link.textContent = 'The session and its recording';
      said.append(link);
      over();
    }
  };
  mine.onclose = () => {
    if (told) return;
    say('The connection to the broker has ended. What runs in the workspace goes on.', true);
    over();
  };
}

async function begin() {
  again.hidden = true;
  say('Opening it …');
  try {
    const secret = await ticket();
    if (secret) connect(secret);
    else over();
  } catch (error) {
    say(`It cannot be opened: ${error.message}`, true);
    over();
  }
}

again.addEventListener('click', begin);
leave.addEventListener('click', () => { if (socket) socket.close(); });
if (window.Terminal && window.FitAddon) begin();
else say('The files of the terminal are missing on the broker\'s host. Use saw ssh, and tell the platform team.', true);
