// Runs the prompts of a CSV file with one column `prompt`, and writes a copy with the results beside them.
//
//   node batch.js prompts.csv results.csv
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { ClaudeQueue } from "./claude_queue.js";

const [source, target] = process.argv.slice(2) as [string, string];
const queue = new ClaudeQueue();
const lines = readFileSync(source, "utf8").split(/\r?\n/).slice(1).filter((line) => line !== "");
const prompts = lines.map((line) => line.replace(/^"(.*)"$/, "$1").replaceAll('""', '"'));
// Started again after a crash, it makes no job twice: the key of a submission is made of the prompt.
const once = (prompt: string, row: number) => createHash("sha256").update(`${source} ${row} ${prompt}`).digest("hex");
const jobs: string[] = [];
for (const [row, prompt] of prompts.entries()) jobs.push((await queue.submit(prompt, {}, once(prompt, row))).id);
const quoted = (value: unknown) => `"${String(value).replaceAll('"', '""')}"`;
const rows = ["prompt,status,result,cost_usd"];
for (const [row, id] of jobs.entries()) {
  const job = await queue.wait(id);
  rows.push([prompts[row], job.status, job.result?.content ?? job.error, job.cost].map(quoted).join(","));
}
writeFileSync(target, rows.join("\n") + "\n");
console.log(`${jobs.length} prompts`);
