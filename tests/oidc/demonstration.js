// The identity provider of the demonstration enterprise: npm oidc-provider at a Unix socket, behind the far end's web server. Unlike the tests'
// provider it asks for a password. It keeps what it knows in memory. Usage: node demonstration.js SETTINGS.json
import { timingSafeEqual, scryptSync, randomBytes } from 'node:crypto';
import { chmodSync, readFileSync, rmSync } from 'node:fs';
import { createServer } from 'node:http';
import Provider from 'oidc-provider';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const salt = randomBytes(16);
const hash = (password) => scryptSync(password, salt, 32);
const passwords = new Map(Object.entries(settings.people).map(([name, person]) => [name, hash(person.password)]));
const nobody = randomBytes(32);
const scope = 'openid offline_access email groups';

const escape = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
const shell = (title, content) => `<!doctype html><html lang="en"><meta charset="utf-8"><title>${title} - Example Enterprise</title>
<meta name="viewport" content="width=device-width">
<style>body{font:16px/1.5 sans-serif;background:#eef1f5;color:#1b2430;margin:0}main{max-width:22rem;margin:12vh auto;padding:2rem;background:#fff;
border-radius:.5rem;box-shadow:0 1px 4px #0003}h1{font-size:1.3rem;margin:0 0 1rem}label{display:block;margin-top:1rem}input{font:inherit;width:100%;
box-sizing:border-box;padding:.5rem;border:1px solid #667;border-radius:.25rem}button{font:inherit;width:100%;margin-top:1.5rem;padding:.6rem;border:0;
border-radius:.25rem;background:#1d4f91;color:#fff}button.no{background:#fff;color:#a11212;margin-top:.75rem}code{font-size:1.6rem}.bad{color:#a11212}</style>
<main><h1>Example Enterprise</h1>${content}</main></html>`;
const page = (action, said, name) => shell('Sign in', `<p>Sign in with the account of your organisation.</p>${said ? `<p class="bad" role="alert">${escape(said)}</p>` : ''}
<form method="post" action="${escape(action)}"><label for="login">E-mail</label><input id="login" name="login" type="email" autocomplete="username" required
value="${escape(name)}"${name ? '' : ' autofocus'}><label for="password">Password</label><input id="password" name="password" type="password"
autocomplete="current-password" required${name ? ' autofocus' : ''}><button>Sign in</button></form>`);
// The provider's own form is in `form`; what is shown around it is ours, since its pages ask for fonts elsewhere.
const deviceFlow = {
  enabled: true,
  userCodeInputSource(context, form, _given, error) {
    context.body = shell('Sign in a device', `<p>Enter the code that your device shows.</p>${error ? '<p class="bad" role="alert">This code does not count.</p>' : ''}
${form}<button type="submit" form="op.deviceInputForm">Continue</button>`);
  },
  userCodeConfirmSource(context, form, client, _device, code) {
    context.body = shell('Sign in a device', `<p><strong>${escape(client.clientId)}</strong> on another device wants to sign in as you. It must show this code:</p>
<p><code>${escape(code)}</code></p><p>Did you not begin this, or is the code another one? Then refuse.</p>${form}
<button type="submit" form="op.deviceConfirmForm" autofocus>Continue</button>
<button type="submit" form="op.deviceConfirmForm" class="no" name="abort" value="yes">Refuse</button>`);
  },
  successSource(context) {
    context.body = shell('Signed in', '<p>Your device is signed in. You can close this page.</p>');
  },
};

const provider = new Provider(settings.issuer, {
  clients: [settings.client],
  jwks: settings.jwks,
  cookies: { keys: settings.cookie_keys },
  scopes: scope.split(' '),
  claims: { openid: ['sub'], email: ['email', 'email_verified'], groups: ['groups'], acr: null, auth_time: null, sid: null },
  pkce: { required: () => true },
  features: {
    backchannelLogout: { enabled: true },
    deviceFlow,
    devInteractions: { enabled: false },
    rpInitiatedLogout: { enabled: true },
  },
  interactions: { url: (_context, interaction) => `/interaction/${interaction.uid}` },
  issueRefreshToken: async (_context, client) => client.grantTypeAllowed('refresh_token'),
  rotateRefreshToken: true,
  // There is one client, of the same enterprise: nobody is asked what it may know.
  async loadExistingGrant(context) {
    const { client, session } = context.oidc;
    const known = session.grantIdFor(client.clientId);
    const grant = (known && (await provider.Grant.find(known))) || new provider.Grant({ accountId: session.accountId, clientId: client.clientId });
    grant.addOIDCScope(scope);
    await grant.save();
    return grant;
  },
  // The broker has a private address, which the provider's guard would refuse.
  fetch: (url, { dispatcher, ...options }) => globalThis.fetch(url, options),
  async findAccount(_context, name) {
    const person = Object.hasOwn(settings.people, name) && settings.people[name];
    return person && { accountId: name, claims: async () => ({ sub: name, email: name, email_verified: true, groups: person.groups }) };
  },
});
provider.proxy = true;

async function body(request) {
  let text = '';
  for await (const piece of request) {
    text += piece;
    if (text.length > 4096) throw new Error('too long');
  }
  return new URLSearchParams(text);
}

function send(response, status, text) {
  response.writeHead(status, {
    'content-type': 'text/html; charset=utf-8',
    'cache-control': 'no-store',
    'content-security-policy': "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
  });
  response.end(text);
}

async function interact(request, response) {
  const { prompt, params, session } = await provider.interactionDetails(request, response);
  if (prompt.name === 'consent') {
    const grant = new provider.Grant({ accountId: session.accountId, clientId: params.client_id });
    grant.addOIDCScope(scope);
    await provider.interactionFinished(request, response, { consent: { grantId: await grant.save() } }, { mergeWithLastSubmission: true });
    return;
  }
  if (request.method !== 'POST') {
    send(response, 200, page(request.url, '', ''));
    return;
  }
  const given = await body(request);
  const name = given.get('login') ?? '';
  // A name that nobody has takes as long.
  if (!timingSafeEqual(hash(given.get('password') ?? ''), passwords.get(name) ?? nobody)) {
    process.stdout.write('sign-in refused\n');
    send(response, 401, page(request.url, 'This e-mail and this password do not belong together.', name));
    return;
  }
  await provider.interactionFinished(request, response, { login: { accountId: name } }, { mergeWithLastSubmission: false });
}

const answer = provider.callback();
rmSync(settings.socket, { force: true });
createServer((request, response) => {
  if (!request.url.startsWith('/interaction/')) {
    answer(request, response);
    return;
  }
  interact(request, response).catch((error) => {
    process.stderr.write(`${error.name}: ${error.message}\n`);
    if (!response.headersSent) send(response, 400, page(request.url, 'This sign-in is over. Begin again where you came from.', ''));
  });
}).listen(settings.socket, () => {
  chmodSync(settings.socket, 0o660);
  process.stdout.write(`READY ${settings.issuer}\n`);
});
