//! The columns of each kind of row, by name: a `select *` that a connection has prepared breaks when a newer release adds
//! a column beside it.

/// The columns of a row type, as text for `concat!`. What isn't listed isn't read by this release.
macro_rules! columns {
    (Job) => {
        "job_number, job_id, key_id, kind, status, hold, priority, group_key, session_id, run_after, deadline_at, \
         attempt, failures, wait_since, wait_reason, max_attempts, on_worker_lost, model, effort, permission_mode, \
         max_turns, timeout_seconds, max_cost, webhook_url, webhook_events, custom_id, metadata, retry_of, claude_session_id, cost, \
         duration_ms, usage, error, error_code, cancel_requested_at, cancel_reason, created_at, started_at, \
         completed_at, last_event_seq, version, data_removed"
    };
    (Endpoint) => {
        "endpoint_number, endpoint_id, key_id, url, event_types, description, payload, headers, secrets, metadata, enabled, \
         disabled_reason, first_failure_at, created_at, updated_at, version"
    };
    (Delivery) => {
        "delivery_number, delivery_id, key_id, endpoint_id, job_id, event_type, url, status, attempts, due_at, created_at, \
         completed_at, last_status_code, last_error_class"
    };
    (Session) => {
        "session_number, session_id, key_id, name, settings, claude_session_id, total_cost, total_turns, created_at, \
         updated_at, working_dir, version"
    };
    (ApiKey) => {
        "key_number, key_id, name, secret_digest, last4, previous_digest, previous_valid_until, scopes, allowed_ips, \
         allowed_models, rate_submit, rate_read, rate_window, max_running_jobs, max_queued_jobs, max_streams, \
         max_priority, metadata, created_at, created_by, expires_at, revoked_at, revoke_reason, last_used_at, version"
    };
    (AuditRow) => {
        "audit_number, at, actor, action, object_id, address, request_id, times, detail"
    };
    (WorkerRow) => {
        "worker_id, host, slots, busy, cli_version, started_at, last_seen_at, paused_until, pause_reason, upstream, \
         clock_ahead"
    };
    (IdempotencyRecord) => {
        "key_id, route, idempotency_key, fingerprint, job_id, status, body, created_at"
    };
}

pub(super) use columns;
