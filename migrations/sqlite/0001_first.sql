-- Times are microseconds since 1970 in UTC, money is millionths of a dollar, JSON is carried as text.

create table instance (
  instance_number integer primary key check (instance_number = 1),
  instance_id text not null,          -- DATA_DIR holds the same value
  data_dir_id text,                   -- DATA_DIR holds this one too: there is one such folder
  secret_check text,                  -- derived from SECRET_KEY; finds a changed one
  created_at integer not null
) strict;

create table queue (
  queue_number integer primary key check (queue_number = 1),
  paused integer not null default 0,  -- by a person
  hold text,                          -- 'budget': nothing is left in the global budget, or all of it is reserved
  resumes integer not null default 0   -- how often somebody lifted the workers' pauses
) strict;
insert into queue (queue_number) values (1);

-- One row for each key: its cap, how many of its jobs run, and the best of those that could.
create table lane (
  key_id text not null primary key,
  max_running integer not null,
  running integer not null default 0 check (running >= 0),
  hold text,                          -- 'budget'
  top_priority integer, -- highest among its ready jobs; a hint that is never too low for long
  last_served integer not null default 0, -- the number of its last turn; the lowest is next
  endpoints integer not null default 0 -- enabled ones of the key: without any, the end of a job has nothing to send
) strict;
create index lane_next on lane (top_priority desc, last_served) where top_priority is not null and hold is null and running < max_running;
create index lane_last_served on lane (last_served);

create table session (
  session_number integer primary key autoincrement,
  session_id text not null unique,
  key_id text not null,
  name text not null,
  settings text not null,
  claude_session_id text,
  total_cost integer not null default 0,
  total_turns integer not null default 0,
  created_at integer not null,
  updated_at integer not null,
  working_dir text,                   -- in its place the agent works; null: in a folder of its own
  version integer not null default 1,    -- of its settings
  deleted_at integer,                    -- its jobs keep its name
  remove_requested integer not null default 0 -- its folder is still to be removed
) strict;
create unique index session_owned on session (key_id, name) where deleted_at is null;
create index session_used on session (key_id, updated_at desc, session_number desc) where deleted_at is null;
create index session_used_all on session (updated_at desc, session_number desc) where deleted_at is null;
create index session_name on session (name, session_number desc) where deleted_at is null;
create index session_remove on session (session_number) where remove_requested;
create index session_claude on session (claude_session_id, session_number desc) where claude_session_id is not null;

create table job (
  job_number integer primary key autoincrement,
  job_id text not null unique,
  key_id text not null,
  kind text not null,
  status text not null default 'queued',
  hold text not null default '',      -- '' is ready
  priority integer not null default 0,
  group_key text,                     -- 's:<session id>' or 'k:<concurrency key>'
  session_id text,
  run_after integer,
  deadline_at integer,
  attempt integer not null default 0,
  failures integer not null default 0,
  wait_since integer,                  -- its first wait for the Messages API, while no run has got past it
  wait_reason text,                   -- what the last such wait is for, in a sentence
  max_attempts integer not null,
  on_worker_lost text not null,
  lease_owner text,
  renewals integer not null default 0, -- of the lease; a sweeper takes it after it has watched it stand still
  model text,
  effort text,
  permission_mode text,
  max_turns integer,
  timeout_seconds integer,
  max_cost integer not null,
  webhook_url text,
  webhook_events text not null default 'completed', -- words with blanks between them
  custom_id text,
  metadata text not null,
  retry_of text,
  claude_session_id text,
  cost integer not null default 0,
  spend text,                         -- what its present run has cost so far, by model
  duration_ms integer not null default 0,
  usage text,
  error text,
  error_code text,
  cancel_requested_at integer,
  cancel_reason text,
  created_at integer not null,
  started_at integer,
  completed_at integer,
  last_event_seq integer not null default 0,
  version integer not null default 1,
  data_removed integer not null default 0,
  remove_requested integer not null default 0, -- by its owner: its workspace is still to be removed
  counted integer not null default 0 -- its end is in the sums of usage
) strict;
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
  job_id text not null primary key,
  message text not null,
  options text not null
) strict;

create table result (
  job_id text not null primary key,
  result text not null
) strict;

create table attempt (
  job_id text not null,
  attempt integer not null,
  worker_id text not null,
  claude_session_id text not null,
  cli_version text,
  reserved integer not null,
  started_at integer not null,
  ended_at integer,
  ending text,                        -- done, failed, cancelled, retry, lost, released
  error_code text,
  cost integer not null default 0,
  reported_cost integer,              -- what the CLI said; decides nothing
  turns integer not null default 0,
  exit text,
  stderr_tail text,
  primary key (job_id, attempt)
) strict;

create table event (
  event_number integer primary key autoincrement,
  job_id text not null,
  seq integer not null,
  event_type text not null,
  at integer not null,
  data text not null,
  unique (job_id, seq)
) strict;

create table idempotency (
  key_id text not null,
  route text not null,
  idempotency_key text not null,
  fingerprint text not null,
  job_id text,
  status integer not null,
  body text not null,
  created_at integer not null,
  primary key (key_id, route, idempotency_key)
) strict;
create index idempotency_age on idempotency (created_at);

-- What was spent. Rows are only ever added; a row without a job is an adjustment.
create table ledger (
  ledger_number integer primary key autoincrement,
  at integer not null,
  key_id text not null,
  job_id text,
  attempt integer,
  session_id text,
  model text,
  cost integer not null,
  input_tokens integer not null default 0,
  output_tokens integer not null default 0,
  cache_creation_input_tokens integer not null default 0,
  cache_read_input_tokens integer not null default 0,
  estimated integer not null default 0,
  price_version text,
  reason text,
  late integer not null default 0, -- what was known only after the attempt was settled
  unique (job_id, attempt, model, late)
) strict;
create index ledger_key on ledger (key_id, at desc, ledger_number desc);
create index ledger_at on ledger (at desc, ledger_number desc);

-- What was used, added up after it was booked, so that reading it costs the same however much there is. All rows of a
-- source up to this number are in the sums.
create table usage_counted (
  source text not null primary key,    -- 'ledger', 'job', 'session'
  number integer not null
) strict, without rowid;
insert into usage_counted (source, number) values ('ledger', 0), ('job', 0), ('session', 0);

-- Lifetime totals of each key: 'cost', 'sessions', 'turns', and jobs by kind and status, such as 'job:done'.
create table usage_total (
  key_id text not null,                -- '*': of all keys
  name text not null,
  value integer not null,
  primary key (key_id, name)
) strict, without rowid;

-- Sums of the ledger over minutes, hours and days.
create table usage_sum (
  dimension text not null,             -- 'model', 'key', 'session': what `name` is
  key_id text not null,                -- '*': of all keys
  span integer not null,                  -- its length, in microseconds
  start_at integer not null,
  name text not null,
  cost integer not null,
  estimated_cost integer not null,
  input_tokens integer not null,
  output_tokens integer not null,
  cache_creation_input_tokens integer not null,
  cache_read_input_tokens integer not null,
  entries integer not null,
  primary key (dimension, key_id, span, start_at, name)
) strict, without rowid;

-- Of each 1,024 numbers of jobs the first and the last time at which one was accepted.
create table job_block (
  block integer not null primary key,
  first_at integer not null,
  last_at integer not null
) strict;

create table budget (
  scope text not null,                -- 'global' or 'key'
  scope_id text not null,             -- the key's id; '' for global
  limit_amount integer not null,
  period text not null,               -- total, day, week, month; UTC, weeks begin on Monday
  alert_thresholds text not null,
  on_exceeded text not null,          -- reject, hold
  origin text not null,               -- 'default': follows CLAUDE_MAX_COST_PER_USER; 'set': by a person
  version integer not null default 1,
  updated_at integer not null,
  primary key (scope, scope_id)
) strict;

create table budget_period (
  scope text not null,
  scope_id text not null,
  period_start integer not null,      -- 0 for the period 'total'
  spent integer not null default 0,
  reserved integer not null default 0 check (reserved >= 0),
  primary key (scope, scope_id, period_start)
) strict;

create table budget_alert (
  scope text not null,
  scope_id text not null,
  period_start integer not null,
  threshold integer not null,
  at integer not null,
  primary key (scope, scope_id, period_start, threshold)
) strict;

-- The worker processes, for people to look at. Nothing is decided by it.
create table worker (
  worker_id text not null primary key,
  host text not null,
  slots integer not null,
  busy integer not null,
  cli_version text not null,
  started_at integer not null,
  last_seen_at integer not null,
  paused_until integer,                   -- it claims nothing until then
  pause_reason text,
  upstream text,                           -- what the Messages API last answered to the worker itself
  clock_ahead integer                       -- seconds, if its clock differs from the database's
) strict;

-- Keys that are kept here, beside those of the environment. A secret is never stored, only its digest under a pepper
-- that isn't in the database. While a key is rotated, its former secret works too, until a time.
create table api_key (
  key_number integer primary key autoincrement,
  key_id text not null unique,        -- 'key_' and the public part of its secrets
  name text not null,
  secret_digest text not null,
  last4 text not null,                -- of the secret, for people
  previous_digest text,
  previous_valid_until integer,
  scopes text not null,               -- words with blanks between them
  allowed_ips text not null,          -- a JSON list; empty allows all
  allowed_models text not null,       -- a JSON list; empty allows all
  rate_submit integer,                -- what is null here is as the service is set up
  rate_read integer,
  rate_window integer,                -- seconds
  max_running_jobs integer,
  max_queued_jobs integer,
  max_streams integer,
  max_priority integer,
  metadata text not null,
  created_at integer not null,
  created_by text not null,           -- a key's id, or 'cli'
  expires_at integer,
  revoked_at integer,
  revoke_reason text,
  last_used_at integer,
  expiry_told integer,                     -- the end that its endpoints were told of
  version integer not null default 1
) strict;
create index api_key_name on api_key (name, key_number desc);
create index api_key_active on api_key (key_number desc) where revoked_at is null;
create index api_key_revoked on api_key (key_number desc) where revoked_at is not null;
create index api_key_expires on api_key (expires_at) where revoked_at is null and expires_at is not null;

-- What was changed or refused: who, when, what. Refused authentications are counted, one row for each address, key
-- and quarter of an hour.
create table audit (
  audit_number integer primary key autoincrement,
  at integer not null,
  actor text not null,                -- a key's id, 'anonymous', 'cli', or '' when it isn't known
  action text not null,               -- 'key.create', 'budget.put', 'auth.refused' …
  object_id text not null,            -- what it was done to
  address text not null,              -- where it came from; '' is unknown
  request_id text not null,
  times integer not null default 1,
  detail text not null                -- JSON; never a secret
) strict;
create index audit_actor on audit (actor, audit_number desc);
create unique index audit_refused on audit (at, address, object_id) where action = 'auth.refused';

-- Where a key's events are sent. Secrets and headers are sealed under a key derived from SECRET_KEY.
create table endpoint (
  endpoint_number integer primary key autoincrement,
  endpoint_id text not null unique,
  key_id text not null,
  url text not null,
  event_types text not null,          -- words with blanks around them; empty: all
  description text not null,
  payload text not null,               -- full, thin
  headers text not null,              -- sealed: a JSON object
  secrets text not null,              -- sealed: a JSON list, the newest first
  metadata text not null,
  enabled integer not null default 1,
  disabled_reason text,
  first_failure_at integer,               -- of an unbroken row of failures
  created_at integer not null,
  updated_at integer not null,
  version integer not null default 1
) strict;
create index endpoint_list on endpoint (key_id, endpoint_number desc);

-- What signs the events that a key's jobs send to their own webhook_url.
create table webhook_secret (
  key_id text not null primary key,
  secrets text not null,              -- sealed: a JSON list, the newest first
  created_at integer not null,
  version integer not null default 1
) strict;

-- The outbox: an event on its way to one address. Rows are written in the transaction of what they tell about.
create table delivery (
  delivery_number integer primary key autoincrement,
  delivery_id text not null unique,
  key_id text not null,
  endpoint_id text,                    -- null: the job's own webhook_url
  job_id text,
  event_type text not null,
  url text not null,
  host text not null,                  -- with the port
  body text,                          -- of a job's event it is written before the first attempt
  status text not null default 'pending', -- pending, succeeded, failed, cancelled
  attempts integer not null default 0,
  due_at integer,                         -- while pending; a claim puts it off for as long as its lease
  manual integer not null default 0,                  -- a person asked for the next attempt
  created_at integer not null,
  completed_at integer,
  last_status_code integer,
  last_error_class text
) strict;
create index delivery_due on delivery (due_at) where status = 'pending';
create index delivery_list on delivery (key_id, delivery_number desc);
create index delivery_job on delivery (job_id) where job_id is not null;
create index delivery_endpoint on delivery (endpoint_id, delivery_number desc) where endpoint_id is not null;
create index delivery_age on delivery (completed_at) where completed_at is not null;

create table delivery_attempt (
  delivery_id text not null,
  number integer not null,
  trigger_kind text not null,             -- scheduled, manual
  started_at integer not null,
  duration_ms integer not null,
  status_code integer,
  error_class text,
  snippet text not null,
  primary key (delivery_id, number)
) strict;
