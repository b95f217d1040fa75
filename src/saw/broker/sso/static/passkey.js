// Registers passkeys and has decisions signed with them. Everything else on these pages works without it.
'use strict';

const csrf = document.querySelector('meta[name=csrf]').content;
const said = document.getElementById('said');

const bytes = (text) => Uint8Array.from(atob(text.replace(/-/g, '+').replace(/_/g, '/')), (letter) => letter.charCodeAt(0));
const text = (buffer) => btoa(String.fromCharCode(...new Uint8Array(buffer))).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '');

async function post(path, body, decision) {
  const answer = await fetch(path, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-csrf-token': csrf },
    body: JSON.stringify(body),
  });
  const told = await answer.json();
  if (!answer.ok) {
    const error = new Error(told.cure ? `${told.message}. What helps: ${told.cure}.` : told.message);
    error.again = answer.status === 401 || told.code === 'sign_in_again' ? 'fresh=1' : '';
    if (told.code === 'step_up_needed') error.again = `step_up=${encodeURIComponent(decision)}`;
    throw error;
  }
  return told;
}

function tell(error) {
  said.className = 'bad';
  said.textContent = error.name === 'NotAllowedError' ? 'No passkey was used: it was cancelled, or took too long.' : error.message;
  if (error.again) {
    const link = document.createElement('a');
    link.href = `/login?${error.again}&to=${encodeURIComponent(location.pathname)}`;
    link.textContent = ' Sign in again';
    said.append(link);
  }
}

function whenSubmitted(form, act) {
  const buttons = [...form.querySelectorAll('button')];
  const enable = (on) => buttons.forEach((button) => { button.disabled = !on; });
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    enable(false);
    said.className = '';
    said.textContent = 'Use your passkey now.';
    try {
      await act(event.submitter);
    } catch (error) {
      tell(error);
      enable(true);
    }
  });
  enable(Boolean(window.PublicKeyCredential));
  if (!window.PublicKeyCredential) tell(new Error('This browser has no passkeys.'));
}

const decide = document.getElementById('decide');
if (decide) {
  // Return in the comment must not decide anything: a decision is a button.
  decide.elements.comment.addEventListener('keydown', (event) => { if (event.key === 'Enter') event.preventDefault(); });
  whenSubmitted(decide, async (button) => {
    const path = `/reviews/${encodeURIComponent(decide.dataset.review)}`;
    const asked = await post(`${path}/request`, {
      decision: button.value, comment: decide.elements.comment.value, render_digest: decide.dataset.render,
    }, button.value);
    const found = await navigator.credentials.get({
      publicKey: {
        challenge: bytes(asked.challenge),
        rpId: asked.rp_id,
        allowCredentials: asked.credentials.map((id) => ({ type: 'public-key', id: bytes(id) })),
        userVerification: 'required',
        timeout: 120000,
      },
    });
    await post(`${path}/decide`, {
      statement: asked.statement,
      id: text(found.rawId),
      authenticator_data: text(found.response.authenticatorData),
      client_data: text(found.response.clientDataJSON),
      signature: text(found.response.signature),
    }, button.value);
    location.reload();
  });
}

const register = document.getElementById('register');
if (register) {
  whenSubmitted(register, async () => {
    const options = await post('/passkeys/options', {});
    options.challenge = bytes(options.challenge);
    options.user.id = bytes(options.user.id);
    options.excludeCredentials = options.excludeCredentials.map((one) => ({ ...one, id: bytes(one.id) }));
    const found = await navigator.credentials.create({ publicKey: options });
    await post('/passkeys', {
      id: text(found.rawId),
      attestation_object: text(found.response.attestationObject),
      client_data: text(found.response.clientDataJSON),
      label: register.elements.label.value,
    });
    location.reload();
  });
}
