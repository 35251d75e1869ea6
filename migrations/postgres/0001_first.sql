-- Times are microseconds since 1970 in UTC, money is millionths of a dollar, JSON is carried as text. Ids compare as
-- bytes, on every system alike: a database's own collation may change with the operating system.

create table instance (
  instance_number bigint primary key check (instance_number = 1),
  instance_id text collate "C" not null,          -- DATA_DIR holds the same value
  data_dir_id text collate "C",                   -- DATA_DIR holds this one too: there is one such folder
  secret_check text,                  -- derived from SECRET_KEY; finds a changed one
  created_at bigint not null
);

create table queue (
  queue_number bigint primary key check (queue_number = 1),
  paused boolean not null default false,  -- by a person
  hold text collate "C",                          -- 'budget': the global budget is used up or reserved
  resumes bigint not null default 0   -- how often somebody lifted the workers' pauses
);
insert into queue (queue_number) values (1);

-- One row for each key: its cap, how many of its jobs run, and the best of those that could.
create table lane (
  key_id text collate "C" primary key,
  max_running bigint not null,
  running bigint not null default 0 check (running >= 0),
  hold text collate "C",                          -- 'budget'
  top_priority bigint, -- highest among its ready jobs; a hint that is never too low for long
  last_served bigint not null default 0, -- the number of its last turn; the lowest is next
  endpoints bigint not null default 0 -- enabled ones of the key: without any, the end of a job has nothing to send
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
create index lane_next on lane (top_priority desc, last_served) where top_priority is not null and hold is null and running < max_running;
create index lane_last_served on lane (last_served);

create table session (
  session_number bigint generated always as identity primary key,
  session_id text collate "C" not null unique,
  key_id text collate "C" not null,
  name text not null,
  settings text not null,
  claude_session_id text collate "C",
  total_cost bigint not null default 0,
  total_turns bigint not null default 0,
  created_at bigint not null,
  updated_at bigint not null,
  working_dir text collate "C",                   -- in its place the agent works; null: in a folder of its own
  version bigint not null default 1,    -- of its settings
  deleted_at bigint,                    -- its jobs keep its name
  remove_requested boolean not null default false -- its folder is still to be removed
);
create unique index session_owned on session (key_id, name) where deleted_at is null;
create index session_used on session (key_id, updated_at desc, session_number desc) where deleted_at is null;
create index session_used_all on session (updated_at desc, session_number desc) where deleted_at is null;
create index session_name on session (name, session_number desc) where deleted_at is null;
create index session_remove on session (session_number) where remove_requested;
create index session_claude on session (claude_session_id, session_number desc) where claude_session_id is not null;

create table job (
  job_number bigint generated always as identity, -- no index on it alone: it would invite walks over the whole table
  job_id text collate "C" primary key,
  key_id text collate "C" not null,
  kind text collate "C" not null,
  status text collate "C" not null default 'queued',
  hold text collate "C" not null default '',      -- '' is ready
  priority bigint not null default 0,
  group_key text collate "C",                     -- 's:<session id>' or 'k:<concurrency key>'
  session_id text collate "C",
  run_after bigint,
  deadline_at bigint,
  attempt bigint not null default 0,
  failures bigint not null default 0,
  wait_since bigint,                  -- its first wait for the Messages API, while no run has got past it
  wait_reason text,                   -- what the last such wait is for, in a sentence
  max_attempts bigint not null,
  on_worker_lost text not null,
  lease_owner text collate "C",
  renewals bigint not null default 0, -- of the lease; a sweeper takes it after it has watched it stand still
  model text collate "C",
  effort text,
  permission_mode text,
  max_turns bigint,
  timeout_seconds bigint,
  max_cost bigint not null,
  webhook_url text,
  webhook_events text not null default 'completed', -- words with blanks between them
  custom_id text collate "C",
  metadata text not null,
  retry_of text collate "C",
  claude_session_id text collate "C",
  cost bigint not null default 0,
  spend text,                         -- what its present run has cost so far, by model
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
  remove_requested boolean not null default false, -- by its owner: its workspace is still to be removed
  counted boolean not null default false -- its end is in the sums of usage
);
-- Of one priority, 'chat' comes before 'job': somebody waits for it.
create index job_queue on job (key_id, hold, priority desc, kind, job_number) where status = 'queued';
create index job_running on job (key_id, status) where status = 'running';
create index job_group on job (key_id, group_key, job_number) where group_key is not null and status in ('queued', 'running');
create unique index job_group_head on job (key_id, group_key)
  where group_key is not null and status in ('queued', 'running') and hold <> 'order';
create index job_due on job (run_after) where status = 'queued' and hold in ('delay', 'usage_limit', 'upstream');
create index job_wait on job (wait_since) where wait_since is not null and status = 'queued';
create index job_deadline on job (deadline_at) where deadline_at is not null and status in ('queued', 'running');
create index job_retention on job (completed_at, job_number) where completed_at is not null and not data_removed;
create index job_uncounted on job (key_id, counted) where completed_at is not null and counted = false;
create index job_remove on job (job_number) where remove_requested;
-- A list has an index for each set of its filters: it reads as many entries as it shows, whatever else is in the table.
create index job_list on job (key_id, kind, job_number desc);
create index job_list_all on job (kind, job_number desc);
create index job_status on job (key_id, kind, status, job_number desc) where status <> 'running';
create index job_status_all on job (kind, status, job_number desc) where status <> 'running';
create index job_custom_id on job (key_id, custom_id, job_number desc) where custom_id is not null;
create index job_custom_id_all on job (custom_id, job_number desc) where custom_id is not null;
create index job_session on job (session_id, job_number desc) where session_id is not null;
-- The messages of sessions.
create index job_message on job (key_id, job_number desc) where session_id is not null and started_at is not null and not data_removed;
create index job_message_all on job (job_number desc) where session_id is not null and started_at is not null and not data_removed;

create table prompt (
  job_id text collate "C" primary key,
  message text not null,
  options text not null
);

create table result (
  job_id text collate "C" primary key,
  result text not null
);

create table attempt (
  job_id text collate "C" not null,
  attempt bigint not null,
  worker_id text collate "C" not null,
  claude_session_id text collate "C" not null,
  cli_version text,
  reserved bigint not null,
  started_at bigint not null,
  ended_at bigint,
  ending text,                        -- done, failed, cancelled, retry, lost, released
  error_code text,
  cost bigint not null default 0,
  reported_cost bigint,              -- what the CLI said; decides nothing
  turns bigint not null default 0,
  exit text,
  stderr_tail text,
  primary key (job_id, attempt)
);

create table event (
  event_number bigint generated always as identity primary key,
  job_id text collate "C" not null,
  seq bigint not null,
  event_type text collate "C" not null,
  at bigint not null,
  data text not null,
  unique (job_id, seq)
);

create table idempotency (
  key_id text collate "C" not null,
  route text collate "C" not null,
  idempotency_key text collate "C" not null,
  fingerprint text collate "C" not null,
  job_id text collate "C",
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
  key_id text collate "C" not null,
  job_id text collate "C",
  attempt bigint,
  session_id text collate "C",
  model text collate "C",
  cost bigint not null,
  input_tokens bigint not null default 0,
  output_tokens bigint not null default 0,
  cache_creation_input_tokens bigint not null default 0,
  cache_read_input_tokens bigint not null default 0,
  estimated boolean not null default false,
  price_version text,
  reason text,
  late boolean not null default false, -- what was known only after the attempt was settled
  unique (job_id, attempt, model, late)
);
create index ledger_key on ledger (key_id, at desc, ledger_number desc);
create index ledger_at on ledger (at desc, ledger_number desc);

-- What was used, added up after it was booked, so that reading it costs the same however much there is. All rows of a
-- source up to this number are in the sums.
create table usage_counted (
  source text collate "C" not null primary key,    -- 'ledger', 'job', 'session'
  number bigint not null
);
insert into usage_counted (source, number) values ('ledger', 0), ('job', 0), ('session', 0);

-- Lifetime totals of each key: 'cost', 'sessions', 'turns', and jobs by kind and status, such as 'job:done'.
create table usage_total (
  key_id text collate "C" not null,                -- '*': of all keys
  name text collate "C" not null,
  value bigint not null,
  primary key (key_id, name)
);

-- Sums of the ledger over minutes, hours and days.
create table usage_sum (
  dimension text collate "C" not null,             -- 'model', 'key', 'session': what `name` is
  key_id text collate "C" not null,                -- '*': of all keys
  span bigint not null,                  -- its length, in microseconds
  start_at bigint not null,
  name text collate "C" not null,
  cost bigint not null,
  estimated_cost bigint not null,
  input_tokens bigint not null,
  output_tokens bigint not null,
  cache_creation_input_tokens bigint not null,
  cache_read_input_tokens bigint not null,
  entries bigint not null,
  primary key (dimension, key_id, span, start_at, name)
);

-- Of each 1,024 numbers of jobs the first and the last time at which one was accepted.
create table job_block (
  block bigint not null primary key,
  first_at bigint not null,
  last_at bigint not null
);

create table budget (
  scope text collate "C" not null,                -- 'global' or 'key'
  scope_id text collate "C" not null,             -- the key's id; '' for global
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
  scope text collate "C" not null,
  scope_id text collate "C" not null,
  period_start bigint not null,      -- 0 for the period 'total'
  spent bigint not null default 0,
  reserved bigint not null default 0 check (reserved >= 0),
  primary key (scope, scope_id, period_start)
);

create table budget_alert (
  scope text collate "C" not null,
  scope_id text collate "C" not null,
  period_start bigint not null,
  threshold bigint not null,
  at bigint not null,
  primary key (scope, scope_id, period_start, threshold)
);

-- The worker processes, for people to look at. Nothing is decided by it.
create table worker (
  worker_id text collate "C" primary key,
  host text not null,
  slots bigint not null,
  busy bigint not null,
  cli_version text not null,
  started_at bigint not null,
  last_seen_at bigint not null,
  paused_until bigint,                   -- it claims nothing until then
  pause_reason text,
  upstream text,                           -- what the Messages API last answered to the worker itself
  clock_ahead bigint                       -- seconds, if its clock differs from the database's
);

-- Keys that are kept here, beside those of the environment. A secret is never stored, only its digest under a pepper
-- that isn't in the database. While a key is rotated, its former secret works too, until a time.
create table api_key (
  key_number bigint generated always as identity primary key,
  key_id text collate "C" not null unique,        -- 'key_' and the public part of its secrets
  name text not null,
  secret_digest text collate "C" not null,
  last4 text not null,                -- of the secret, for people
  previous_digest text collate "C",
  previous_valid_until bigint,
  scopes text not null,               -- words with blanks between them
  allowed_ips text not null,          -- a JSON list; empty allows all
  allowed_models text not null,       -- a JSON list; empty allows all
  rate_submit bigint,                -- what is null here is as the service is set up
  rate_read bigint,
  rate_window bigint,                -- seconds
  max_running_jobs bigint,
  max_queued_jobs bigint,
  max_streams bigint,
  max_priority bigint,
  metadata text not null,
  created_at bigint not null,
  created_by text collate "C" not null,           -- a key's id, or 'cli'
  expires_at bigint,
  revoked_at bigint,
  revoke_reason text,
  last_used_at bigint,
  expiry_told bigint,                     -- the end that its endpoints were told of
  version bigint not null default 1
);
create index api_key_name on api_key (name, key_number desc);
create index api_key_active on api_key (key_number desc) where revoked_at is null;
create index api_key_revoked on api_key (key_number desc) where revoked_at is not null;
create index api_key_expires on api_key (expires_at) where revoked_at is null and expires_at is not null;

-- What was changed or refused: who, when, what. Refused authentications are counted, one row for each address, key
-- and quarter of an hour.
create table audit (
  audit_number bigint generated always as identity primary key,
  at bigint not null,
  actor text collate "C" not null,                -- a key's id, 'anonymous', 'cli', or '' when it isn't known
  action text collate "C" not null,               -- 'key.create', 'budget.put', 'auth.refused' …
  object_id text collate "C" not null,            -- what it was done to
  address text collate "C" not null,              -- where it came from; '' is unknown
  request_id text collate "C" not null,
  times bigint not null default 1,
  detail text not null                -- JSON; never a secret
);
create index audit_actor on audit (actor, audit_number desc);
create unique index audit_refused on audit (at, address, object_id) where action = 'auth.refused';

-- Rate limits: when each bucket is full again. Losing them in a crash lets everybody begin anew, which does no harm, so
-- they needn't be logged. On SQLite these two tables are in a file of their own, made by storage/limit.rs.
create unlogged table rate_limit (
  bucket text collate "C" primary key,            -- a key's id and the policy, or an address
  full_at bigint not null,
  asked_at bigint not null,           -- when it was last asked
  granted boolean not null            -- whether the call was allowed
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Event streams that are open, of keys that may only have so many. A row that isn't renewed counts no more.
create unlogged table open_stream (
  stream_id text collate "C" primary key,
  process_id text collate "C" not null,           -- the API process that serves it
  key_id text collate "C" not null,
  valid_until bigint not null
);
create index open_stream_key on open_stream (key_id);
create index open_stream_process on open_stream (process_id);

-- Where a key's events are sent. Secrets and headers are sealed under a key derived from SECRET_KEY.
create table endpoint (
  endpoint_number bigint generated always as identity primary key,
  endpoint_id text collate "C" not null unique,
  key_id text collate "C" not null,
  url text not null,
  event_types text not null,          -- words with blanks around them; empty: all
  description text not null,
  payload text collate "C" not null,               -- full, thin
  headers text not null,              -- sealed: a JSON object
  secrets text not null,              -- sealed: a JSON list, the newest first
  metadata text not null,
  enabled boolean not null default true,
  disabled_reason text collate "C",
  first_failure_at bigint,               -- of an unbroken row of failures
  created_at bigint not null,
  updated_at bigint not null,
  version bigint not null default 1
);
create index endpoint_list on endpoint (key_id, endpoint_number desc);

-- What signs the events that a key's jobs send to their own webhook_url.
create table webhook_secret (
  key_id text collate "C" primary key,
  secrets text not null,              -- sealed: a JSON list, the newest first
  created_at bigint not null,
  version bigint not null default 1
);

-- The outbox: an event on its way to one address. Rows are written in the transaction of what they tell about.
create table delivery (
  delivery_number bigint generated always as identity primary key,
  delivery_id text collate "C" not null unique,
  key_id text collate "C" not null,
  endpoint_id text collate "C",                    -- null: the job's own webhook_url
  job_id text collate "C",
  event_type text collate "C" not null,
  url text not null,
  host text collate "C" not null,                  -- with the port
  body text,                          -- of a job's event it is written before the first attempt
  status text collate "C" not null default 'pending', -- pending, succeeded, failed, cancelled
  attempts bigint not null default 0,
  due_at bigint,                         -- while pending; a claim puts it off for as long as its lease
  manual boolean not null default false,                  -- a person asked for the next attempt
  created_at bigint not null,
  completed_at bigint,
  last_status_code bigint,
  last_error_class text collate "C"
);
create index delivery_due on delivery (due_at) where status = 'pending';
create index delivery_list on delivery (key_id, delivery_number desc);
create index delivery_job on delivery (job_id) where job_id is not null;
create index delivery_endpoint on delivery (endpoint_id, delivery_number desc) where endpoint_id is not null;
create index delivery_age on delivery (completed_at) where completed_at is not null;

create table delivery_attempt (
  delivery_id text collate "C" not null,
  number bigint not null,
  trigger_kind text collate "C" not null,             -- scheduled, manual
  started_at bigint not null,
  duration_ms bigint not null,
  status_code bigint,
  error_class text collate "C",
  snippet text not null,
  primary key (delivery_id, number)
);
