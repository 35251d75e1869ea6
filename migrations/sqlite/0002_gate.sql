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
  version integer not null default 1
) strict;

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
create unique index audit_refused on audit (at, address, object_id) where action = 'auth.refused';
