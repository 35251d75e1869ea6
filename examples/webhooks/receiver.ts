// Receives webhooks of claude-queue, verifies them and prints them.
//
// Needs: npm install standardwebhooks
// Usage: WEBHOOK_SECRET=whsec_... node receiver.js [PORT]

import { createServer, IncomingMessage } from "node:http";
import { AddressInfo } from "node:net";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

interface Event {
  type: string;
  job?: { id: string; status: string };
  data?: { id?: string; status?: string };
}

const webhook = new Webhook(process.env.WEBHOOK_SECRET ?? "");
const seen = new Set<string>();

async function bytes(request: IncomingMessage): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for await (const chunk of request) {
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

const server = createServer(async (request, response) => {
  const body = await bytes(request);
  const id = String(request.headers["webhook-id"]);
  let event: Event;
  try {
    event = webhook.verify(body, request.headers as Record<string, string>) as Event;
  } catch (error) {
    if (!(error instanceof WebhookVerificationError)) {
      throw error;
    }
    console.error(`refused: ${error.message}`);
    response.writeHead(401).end();
    return;
  }
  // An event may come twice; its id tells.
  if (!seen.has(id)) {
    seen.add(id);
    const about = event.job ?? event.data ?? {};
    console.log(event.type, about.id, about.status);
  }
  response.writeHead(204).end();
});

server.listen(Number(process.argv[2] ?? 0), "127.0.0.1", () => {
  const { port } = server.address() as AddressInfo;
  console.log(`listening on http://127.0.0.1:${port}/`);
});
