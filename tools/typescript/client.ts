// Runs a job with a client that was made from the OpenAPI document: its path types are in `api.d.ts`.
import createClient from "openapi-fetch";
import type { paths } from "./api.js";

const client = createClient<paths>({
  baseUrl: process.env.CLAUDE_QUEUE_URL ?? "",
  headers: { "X-API-Key": process.env.CLAUDE_QUEUE_API_KEY ?? "" },
});
const submitted = await client.POST("/api/v1/jobs", { body: { message: "Say hello." } });
if (!submitted.data) throw new Error(submitted.error.detail);
const id: string = submitted.data.data.id;
for (;;) {
  const read = await client.GET("/api/v1/jobs/{id}", { params: { path: { id }, query: { wait: 20 } } });
  if (!read.data) throw new Error(read.error?.detail);
  const job = read.data.data;
  if (job.status === "done" || job.status === "failed" || job.status === "cancelled") {
    console.log(job.status, job.result?.content);
    break;
  }
}
const missing = await client.GET("/api/v1/jobs/{id}", { params: { path: { id: "job_none" } } });
console.log(missing.error?.code);
