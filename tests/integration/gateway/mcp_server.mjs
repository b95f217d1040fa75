// An MCP server over streamable HTTP, made with the reference SDK: the far end of tests. node mcp_server.mjs PACKAGES ADDRESS CERT KEY
// It prints "ready", then each call of a tool that reached it as one line of JSON.
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:https";

const [packages, address, cert, key] = process.argv.slice(2);
const sdk = `${packages}/@modelcontextprotocol/sdk/dist/esm`;
const { Server } = await import(`${sdk}/server/index.js`);
const { StreamableHTTPServerTransport } = await import(`${sdk}/server/streamableHttp.js`);
const types = await import(`${sdk}/types.js`);
const sessions = new Map();

function made() {
  const server = new Server({ name: "docs", version: "1.0.0" }, { capabilities: { tools: {} } });
  const tools = ["read", "publish", "erase"].map((name) => ({ name, inputSchema: { type: "object" } }));
  server.setRequestHandler(types.ListToolsRequestSchema, () => ({ tools }));
  server.setRequestHandler(types.CallToolRequestSchema, ({ params }) => {
    console.log(JSON.stringify({ tool: params.name, arguments: params.arguments ?? {} }));
    return { content: [{ type: "text", text: `did ${params.name}` }] };
  });
  return server;
}

async function answer(request, response) {
  let transport = sessions.get(request.headers["mcp-session-id"]);
  if (transport === undefined) {
    const onsessioninitialized = (id) => sessions.set(id, transport);
    transport = new StreamableHTTPServerTransport({ sessionIdGenerator: randomUUID, onsessioninitialized });
    await made().connect(transport);
  }
  await transport.handleRequest(request, response);
}

createServer({ cert: readFileSync(cert), key: readFileSync(key) }, answer).listen(443, address, () => console.log("ready"));
