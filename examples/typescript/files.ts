// Brings a file into a session, lets a job work on it, and fetches what the job wrote.
//
//   node files.js input.txt "Count the words of input.txt into count.txt" out
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { ClaudeQueue } from "./claude_queue.js";

const [source, message, target] = process.argv.slice(2) as [string, string, string];
const queue = new ClaudeQueue();
const session = (await queue.session("files-example")).name;
const stored = await queue.upload(session, basename(source), new Blob([readFileSync(source)]));
console.log("stored", stored.path);
const job = await queue.wait((await queue.submit(message, { session })).id);
if (job.status !== "done") throw new Error(`${job.status}: ${job.error}`);
mkdirSync(target, { recursive: true });
for (const change of job.result?.files_changed ?? []) {
  if (change.status === "deleted") continue;
  const file = await queue.file(job.id, change.path);
  // The agent chose the name: only its last part is used here.
  writeFileSync(join(target, basename(change.path)), Buffer.from(await file.arrayBuffer()));
  console.log("fetched", change.path);
}
