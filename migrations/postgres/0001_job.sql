-- Times are microseconds since 1970 in UTC, money is millionths of a dollar, JSON is carried as text.

create table instance (
  instance_number bigint primary key check (instance_number = 1),
  instance_id text not null,          -- DATA_DIR holds the same value
  secret_check text,                  -- derived from SECRET_KEY; finds a changed one
  created_at bigint not null
);

create table queue (
  queue_number bigint primary key check (queue_number = 1),
  paused boolean not null default false,  -- by a person
  hold text,                          -- 'budget': the global budget is used up or reserved
  resumes bigint not null default 0   -- how often somebody lifted the workers' pauses
);
insert into queue (queue_number) values (1);

-- One row for each key: how many of its jobs run, and the best of those that could.
create table lane (
  key_id text primary key,
  max_running bigint not null,
  running bigint not null default 0 check (running >= 0),
  hold text,                          -- 'budget'
  top bigint,                        -- highest priority among its ready jobs; a hint that is never too low for long
  turn bigint not null default 0     -- when it last had a turn
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
create index lane_next on lane (top desc, turn) where top is not null and hold is null and running < max_running;
create index lane_turn on lane (turn);

create table session (
  session_number bigint generated always as identity primary key,
  session_id text not null unique,
  key_id text not null,
  name text not null,
  settings text not null,
  claude_session_id text,
  total_cost bigint not null default 0,
  total_turns bigint not null default 0,
  created_at bigint not null,
  updated_at bigint not null,
  unique (key_id, name)
);

create table job (
  job_number bigint generated always as identity, -- no index on it alone: it would invite walks over the whole table
  job_id text primary key,
  key_id text not null,
  kind text not null,
  status text not null default 'queued',
  hold text not null default '',      -- '' is ready
  priority bigint not null default 0,
  group_key text,                     -- 's:<session id>' or 'k:<concurrency key>'
  session_id text,
  run_after bigint,
  deadline_at bigint,
  attempt bigint not null default 0,
  failures bigint not null default 0,
  wait_since bigint,                  -- its first wait for the Messages API, while no run has got past it
  wait_reason text,                   -- what the last such wait is for, in a sentence
  max_attempts bigint not null,
  on_worker_lost text not null,
  lease_owner text,
  renewals bigint not null default 0, -- of the lease; a sweeper takes it after it has watched it stand still
  model text,
  effort text,
  permission_mode text,
  max_turns bigint,
  timeout_seconds bigint,
  max_cost bigint not null,
  webhook_url text,
  custom_id text,
  metadata text not null,
  retry_of text,
  claude_session_id text,
  cost bigint not null default 0,
  duration_ms bigint not null default 0,
  usage text,
  error text,
  error_code text,
  cancel_requested_at bigint,
  cancel_reason text,
  created_at bigint not null,
  started_at bigint,
  completed_at bigint,
  last_event_seq bigint not null default 0,
  version bigint not null default 1,
  data_removed boolean not null default false,
  remove_requested boolean not null default false -- by its owner: its workspace is still to be removed
);
create index job_queue on job (key_id, hold, priority desc, job_number) where status = 'queued';
create index job_running on job (key_id) where status = 'running';
create index job_group on job (key_id, group_key, job_number) where group_key is not null and status in ('queued', 'running');
create unique index job_group_head on job (key_id, group_key)
  where group_key is not null and status in ('queued', 'running') and hold <> 'order';
create index job_due on job (run_after) where status = 'queued' and hold in ('delay', 'usage_limit', 'upstream');
create index job_wait on job (wait_since) where wait_since is not null and status = 'queued';
create index job_deadline on job (deadline_at) where deadline_at is not null and status in ('queued', 'running');
create index job_retention on job (completed_at, job_number) where completed_at is not null and not data_removed;
create index job_remove on job (job_number) where remove_requested;
create index job_list on job (key_id, job_number desc);
create index job_session on job (session_id, job_number desc) where session_id is not null;

create table prompt (
  job_id text primary key,
  message text not null,
  options text not null
);

create table result (
  job_id text primary key,
  result text not null
);

create table attempt (
  job_id text not null,
  attempt bigint not null,
  worker_id text not null,
  claude_session_id text not null,
  cli_version text,
  reserved bigint not null,
  spend text,                         -- what it has cost so far, while it runs
  started_at bigint not null,
  ended_at bigint,
  ending text,                        -- done, failed, cancelled, retry, lost, released
  error_code text,
  cost bigint not null default 0,
  turns bigint not null default 0,
  exit text,
  stderr_tail text,
  primary key (job_id, attempt)
);

create table event (
  event_number bigint generated always as identity primary key,
  job_id text not null,
  seq bigint not null,
  event_type text not null,
  at bigint not null,
  data text not null,
  unique (job_id, seq)
);

create table idempotency (
  key_id text not null,
  route text not null,
  idempotency_key text not null,
  fingerprint text not null,
  job_id text,
  status bigint not null,
  body text not null,
  created_at bigint not null,
  primary key (key_id, route, idempotency_key)
);
create index idempotency_age on idempotency (created_at);

-- What was spent. Rows are only ever added; a row without a job is an adjustment.
create table ledger (
  ledger_number bigint generated always as identity primary key,
  at bigint not null,
  key_id text not null,
  job_id text,
  attempt bigint,
  session_id text,
  model text,
  cost bigint not null,
  input_tokens bigint not null default 0,
  output_tokens bigint not null default 0,
  cache_creation_input_tokens bigint not null default 0,
  cache_read_input_tokens bigint not null default 0,
  estimated boolean not null default false,
  price_version text,
  reason text,
  unique (job_id, attempt, model)
);
create index ledger_key on ledger (key_id, at);
create index ledger_at on ledger (at);

create table budget (
  scope text not null,                -- 'global' or 'key'
  scope_id text not null,             -- the key's id; '' for global
  limit_amount bigint not null,
  period text not null,               -- total, day, week, month; UTC, weeks begin on Monday
  alert_thresholds text not null,
  on_exceeded text not null,          -- reject, hold
  origin text not null,               -- 'default': follows CLAUDE_MAX_COST_PER_USER; 'set': by a person
  version bigint not null default 1,
  updated_at bigint not null,
  primary key (scope, scope_id)
);

create table budget_period (
  scope text not null,
  scope_id text not null,
  period_start bigint not null,      -- 0 for the period 'total'
  spent bigint not null default 0,
  reserved bigint not null default 0 check (reserved >= 0),
  primary key (scope, scope_id, period_start)
);

create table budget_alert (
  scope text not null,
  scope_id text not null,
  period_start bigint not null,
  threshold bigint not null,
  at bigint not null,
  primary key (scope, scope_id, period_start, threshold)
);

-- What running attempts may still spend; a row is deleted when its attempt is settled.
create table reservation (
  job_id text not null,
  attempt bigint not null,
  scope text not null,
  scope_id text not null,
  period_start bigint not null,
  amount bigint not null,
  primary key (job_id, attempt, scope, scope_id)
);

-- The worker processes, for people to look at. Nothing is decided by it.
create table worker (
  worker_id text primary key,
  host text not null,
  slots bigint not null,
  busy bigint not null,
  cli_version text not null,
  started_at bigint not null,
  last_seen_at bigint not null,
  paused_until bigint,                   -- it claims nothing until then
  pause_reason text,
  upstream text                           -- what the Messages API last answered to the worker itself
);
