// A client of claude-queue in one file, for Node.js 20 or later, without other libraries. Copy it into your project.

export interface Job {
  id: string;
  status: "queued" | "running" | "done" | "failed" | "cancelled";
  error: string | null;
  cost: number;
  result: { content: string; files_changed?: FileChange[] | null } | null;
}

export interface FileChange {
  path: string;
  status: string;
  size: number | null;
  digest: string | null;
}

export interface JobEvent {
  seq: number;
  type: string;
  data: Record<string, unknown>;
}

/** A request that was refused: `code` is for programs, `body` the whole problem. */
export class Problem extends Error {
  readonly status: number;
  readonly body: { code?: string; detail?: string };

  constructor(status: number, body: { code?: string; detail?: string }) {
    super(`${status} ${body.code}: ${body.detail}`);
    this.status = status;
    this.body = body;
  }
}

const FINAL = ["done", "failed", "cancelled"];
const pause = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class ClaudeQueue {
  readonly url: string;
  readonly key: string | undefined;
  /** For how many milliseconds a request that can't be served now is tried again. */
  patience = 120_000;

  constructor(url = process.env.CLAUDE_QUEUE_URL ?? "http://127.0.0.1:8000", key = process.env.CLAUDE_QUEUE_API_KEY) {
    this.url = url.replace(/\/$/, "");
    this.key = key;
  }

  /** Submits a job; `settings` are those of the API. Trying again never makes a second job. */
  async submit(message: string, settings: Record<string, unknown> = {}, once: string = crypto.randomUUID()): Promise<Job> {
    const body = JSON.stringify({ message, ...settings });
    const headers = { "Content-Type": "application/json", "Idempotency-Key": once };
    return this.data(await this.ask("POST", "/api/v1/jobs", { body, headers }));
  }

  /** The job once it has ended. */
  async wait(id: string): Promise<Job> {
    for (;;) {
      const job: Job = await this.data(await this.ask("GET", `/api/v1/jobs/${id}?wait=50`));
      if (FINAL.includes(job.status)) return job;
    }
  }

  /** The events of a job as they happen, to its end. A lost connection is taken up after the last one that was seen. */
  async *events(id: string, after = 0): AsyncGenerator<JobEvent> {
    for (let failures = 0; ; ) {
      try {
        const headers = { Accept: "text/event-stream", "Last-Event-ID": String(after) };
        const answer = await this.ask("GET", `/api/v1/jobs/${id}/events`, { headers });
        if (answer.status === 204 || !answer.body) return;
        for await (const event of parse(answer.body)) {
          after = event.seq;
          failures = 0;
          yield event;
          if (FINAL.includes(event.type) || event.type === "error") return;
        }
      } catch (error) {
        if (error instanceof Problem || ++failures > 10) throw error;
      }
      await pause(Math.min(5_000, 200 * 2 ** failures));
    }
  }

  /** Makes a session, or gives the one of this name other settings. */
  async session(name: string, settings: Record<string, unknown> = {}): Promise<{ name: string; id: number }> {
    const body = JSON.stringify({ name, ...settings });
    return this.data(await this.ask("POST", "/api/v1/sessions", { body, headers: { "Content-Type": "application/json" } }));
  }

  /** Stores a file in the session's workspace. */
  async upload(session: string, path: string, content: Blob): Promise<{ path: string; size: number }> {
    const body = new FormData();
    body.append("path", path);
    body.append("file", content, "file");
    return this.data(await this.ask("POST", `/api/v1/sessions/${encodeURIComponent(session)}/files`, { body }));
  }

  /** A file of the workspace in which the job runs. */
  async file(id: string, path: string): Promise<Response> {
    return this.ask("GET", `/api/v1/jobs/${id}/files/${path.split("/").map(encodeURIComponent).join("/")}`);
  }

  private async data<T>(answer: Response): Promise<T> {
    return ((await answer.json()) as { data: T }).data;
  }

  /** The answer, once there is one that isn't about the moment. */
  private async ask(method: string, path: string, init: RequestInit = {}): Promise<Response> {
    const headers = new Headers(init.headers);
    if (this.key) headers.set("X-API-Key", this.key);
    const repeatable = method === "GET" || headers.has("Idempotency-Key");
    const until = Date.now() + this.patience;
    for (let attempt = 1; ; attempt++) {
      let after = Math.min(10_000, 250 * 2 ** attempt);
      const answer = await fetch(this.url + path, { ...init, method, headers, redirect: "error" }).catch((error) => {
        if (!repeatable || Date.now() > until) throw error;
      });
      if (answer?.ok) return answer;
      if (answer) {
        const problem = new Problem(answer.status, (await answer.json().catch(() => ({}))) as { code?: string });
        const passes = answer.status === 429 || (answer.status === 503 && repeatable);
        const said = Number(answer.headers.get("retry-after") ?? Number.NaN);
        if (said >= 0) after = said * 1_000;
        const hopeless = answer.headers.get("x-should-retry") === "false";
        if (!passes || hopeless || Date.now() + after > until) throw problem;
      }
      await pause(after * (1 + Math.random() / 4));
    }
  }
}

/** The events of a stream. */
async function* parse(body: ReadableStream<Uint8Array>): AsyncGenerator<JobEvent> {
  const decoder = new TextDecoder();
  let text = "";
  let event: { seq?: number; type?: string; data: string[] } = { data: [] };
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const lines = text.split(/\r?\n/);
      text = lines.pop() ?? "";
      for (const line of lines) {
        const [, name, content] = /^([^:]*):? ?(.*)$/.exec(line) ?? [];
        if (line === "") {
          if (event.seq !== undefined && event.data.length > 0) {
            yield { seq: event.seq, type: event.type ?? "", data: JSON.parse(event.data.join("\n")) };
          }
          event = { data: [] };
        } else if (name === "id") event.seq = Number(content);
        else if (name === "event") event.type = content;
        else if (name === "data") event.data.push(content ?? "");
      }
    }
  } finally {
    await reader.cancel();
  }
}
