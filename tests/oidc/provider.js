// A real OpenID provider for tests: npm oidc-provider over TLS on a free port of loopback, or where it is told. Its people are in a file that it
// reads for each token, so a test can change somebody's groups. Usage: node provider.js SETTINGS.json
import { readFileSync } from 'node:fs';
import { createServer } from 'node:https';
import Provider, { errors } from 'oidc-provider';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const people = () => JSON.parse(readFileSync(settings.people, 'utf8'));
let provider;
const server = createServer(
  { cert: readFileSync(settings.certificate), key: readFileSync(settings.key) },
  (request, response) => provider.callback()(request, response),
);

server.listen(settings.port ?? 0, settings.address ?? '127.0.0.1', () => {
  const issuer = `https://${settings.address ?? 'localhost'}:${server.address().port}`;
  provider = new Provider(issuer, {
    clients: settings.clients,
    jwks: settings.jwks,
    cookies: { keys: settings.cookie_keys },
    scopes: ['openid', 'offline_access', 'email', 'groups'],
    claims: { openid: ['sub'], email: ['email', 'email_verified'], groups: ['groups'], acr: null, auth_time: null, sid: null },
    acrValues: ['loa1', 'phr'],
    pkce: { required: () => true },
    features: {
      backchannelLogout: { enabled: true },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => undefined,
        getResourceServerInfo(_context, resource) {
          if (!(settings.audiences ?? []).includes(resource)) throw new errors.InvalidTarget();
          return { scope: '', audience: resource, accessTokenFormat: 'jwt', accessTokenTTL: 300, jwt: { sign: { alg: 'RS256' } } };
        },
      },
      deviceFlow: { enabled: true },
      devInteractions: { enabled: true },
      rpInitiatedLogout: { enabled: true },
    },
    issueRefreshToken: async (_context, client) => client.grantTypeAllowed('refresh_token'),
    rotateRefreshToken: true,
    // The broker is at loopback here, which the provider's guard against special addresses would refuse.
    fetch: (url, { dispatcher, ...options }) => globalThis.fetch(url, options),
    async findAccount(_context, id) {
      const person = people()[id];
      return person && { accountId: id, claims: async () => ({ sub: id, ...person }) };
    },
  });
  // Its own pages know one way to sign in. How strong that was is what the file of people says under "reached".
  const login = provider.Session.prototype.loginAccount;
  provider.Session.prototype.loginAccount = function loginAccount(details) {
    return login.call(this, { ...details, acr: people()[details.accountId]?.reached ?? details.acr });
  };
  process.stdout.write(`READY ${issuer}\n`);
});
