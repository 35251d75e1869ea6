// Submits a job, follows it, and prints what came of it.
import { ClaudeQueue } from "./claude_queue.js";

const queue = new ClaudeQueue();
const submitted = await queue.submit(process.argv.slice(2).join(" ") || "Say hello.");
console.log("submitted", submitted.id);
for await (const event of queue.events(submitted.id)) {
  if (event.type === "assistant") console.log(event.data.content);
}
const job = await queue.wait(submitted.id);
console.log(`${job.status} for $${job.cost}: ${job.result?.content ?? job.error}`);
process.exitCode = job.status === "done" ? 0 : 1;
