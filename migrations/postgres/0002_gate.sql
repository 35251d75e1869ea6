-- Keys that are kept here, beside those of the environment. A secret is never stored, only its digest under a pepper
-- that isn't in the database. While a key is rotated, its former secret works too, until a time.
create table api_key (
  key_number bigint generated always as identity primary key,
  key_id text not null unique,        -- 'key_' and the public part of its secrets
  name text not null,
  secret_digest text not null,
  last4 text not null,                -- of the secret, for people
  previous_digest text,
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
  created_by text not null,           -- a key's id, or 'cli'
  expires_at bigint,
  revoked_at bigint,
  revoke_reason text,
  last_used_at bigint,
  version bigint not null default 1
);

-- What was changed or refused: who, when, what. Refused authentications are counted, one row for each address, key
-- and quarter of an hour.
create table audit (
  audit_number bigint generated always as identity primary key,
  at bigint not null,
  actor text not null,                -- a key's id, 'anonymous', 'cli', or '' when it isn't known
  action text not null,               -- 'key.create', 'budget.put', 'auth.refused' …
  object_id text not null,            -- what it was done to
  address text not null,              -- where it came from; '' is unknown
  request_id text not null,
  times bigint not null default 1,
  detail text not null                -- JSON; never a secret
);
create unique index audit_refused on audit (at, address, object_id) where action = 'auth.refused';

-- Rate limits: when each bucket is full again. Losing them in a crash lets everybody begin anew, which does no harm, so
-- they needn't be logged. On SQLite these two tables are in a file of their own, made by storage/limit.rs.
create unlogged table rate_limit (
  bucket text primary key,            -- a key's id and the policy, or an address
  full_at bigint not null,
  asked_at bigint not null,           -- the last time somebody took from it
  granted boolean not null            -- whether he got it
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Event streams that are open, of keys that may only have so many. A row that isn't renewed counts no more.
create unlogged table open_stream (
  stream_id text primary key,
  process_id text not null,           -- the API process that serves it
  key_id text not null,
  valid_until bigint not null
);
create index open_stream_key on open_stream (key_id);
create index open_stream_process on open_stream (process_id);
