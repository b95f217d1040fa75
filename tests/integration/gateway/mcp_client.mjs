// An MCP client made with the reference SDK that calls through ring 2, as ring 1 would bring its calls there.
// node mcp_client.mjs PACKAGES ADDRESS CA CERT KEY URL; each line on stdin is one request, each line on stdout its outcome.
import { readFileSync } from "node:fs";
import { request } from "node:https";
import { createInterface } from "node:readline";
import { Readable } from "node:stream";

const [packages, address, ca, cert, key, url] = process.argv.slice(2);
const sdk = `${packages}/@modelcontextprotocol/sdk/dist/esm`;
const { Client } = await import(`${sdk}/client/index.js`);
const { StreamableHTTPClientTransport } = await import(`${sdk}/client/streamableHttp.js`);
const identity = { ca: readFileSync(ca), cert: readFileSync(cert), key: readFileSync(key) };

function throughRing2(target, init = {}) {
  const { pathname, host } = new URL(target);
  const control = { host, "x-saw-ring1": "allow", "x-saw-binary": "/usr/bin/curl" };
  const headers = { ...Object.fromEntries(new Headers(init.headers)), ...control };
  const to = { host: address, port: 8443, servername: "ring2.saw.internal", path: pathname, method: init.method ?? "GET" };
  return new Promise((resolve, reject) => {
    const sent = request({ ...to, ...identity, headers, signal: init.signal ?? undefined }, (response) => {
      const empty = [202, 204, 304].includes(response.statusCode) && response.headers["content-length"] === "0";
      const body = empty ? null : Readable.toWeb(response);
      resolve(new Response(body, { status: response.statusCode, headers: Object.entries(response.headers) }));
    });
    sent.on("error", reject);
    sent.end(init.body);
  });
}

const client = new Client({ name: "agent", version: "1.0.0" });
await client.connect(new StreamableHTTPClientTransport(new URL(url), { fetch: throughRing2 }));
console.log(JSON.stringify({ ready: true }));
for await (const line of createInterface({ input: process.stdin })) {
  const { tool, args } = JSON.parse(line);
  try {
    const done = tool === undefined ? await client.listTools() : await client.callTool({ name: tool, arguments: args });
    console.log(JSON.stringify({ result: done }));
  } catch (error) {
    console.log(JSON.stringify({ error: String(error.message) }));
  }
}
process.exit(0);
