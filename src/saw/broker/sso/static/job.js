// Shows how a job goes on while its page is looked at. What comes is the broker's own page of it, in which all text is escaped.
'use strict';

const EVERY = 3000;
const said = document.getElementById('said');
let now = document.getElementById('now');

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch(`/jobs/${encodeURIComponent(now.dataset.job)}/now`);
      if (!answer.ok) {
        said.textContent = 'This page goes on no more: load it again.';
        return;
      }
      const found = new DOMParser().parseFromString(await answer.text(), 'text/html').getElementById('now');
      if (found.dataset.state !== now.dataset.state) {
        // What may be done with it has changed too.
        location.reload();
        return;
      }
      if (found.outerHTML !== now.outerHTML) {
        if (found.dataset.told !== now.dataset.told) said.textContent = found.dataset.told;
        now.replaceWith(document.adoptNode(found));
        now = document.getElementById('now');
      }
    } catch {
      said.textContent = 'The broker does not answer; trying again.';
    }
  }
  setTimeout(look, EVERY);
}

setTimeout(look, EVERY);
