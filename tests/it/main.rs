//! The product through its binaries. A case runs on both databases if storage matters to it.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod bad_input; // What may not be submitted: each its own problem, and nothing written.
mod budgets; // Money: never more than the limit, whoever dies.
mod cancel; // A cancel, a timeout: final, paid for, and no process left.
mod chaos; // Everything at once, and what holds afterwards.
mod chat; // Chat: a job that somebody waits for.
mod clocks; // A machine whose clock is wrong.
mod commands; // What people type: the demo, the service, the client.
mod config; // Bad settings stop the start and say which.
mod contention; // Locks that others hold, and what the database refuses.
mod crash; // Processes that are killed and stopped: nothing lost, nothing run twice at once.
mod deliveries;
mod drain; // A process that is told to stop.
mod events; // The stream of a job's events: replayed, live, resumed.
mod examples; // The examples do what they say.
mod files; // Files in and out of workspaces.
mod gate; // Keys, request ids, slow clients, the drain.
mod idempotency; // A retried submission makes one job.
mod jobs; // From submission to result, and what can be read in between.
mod keys; // Keys of the database: created, used, rotated, revoked.
mod limits; // How often a key may ask, and that the headers say it.
mod openapi; // The description of the API: others make clients from it.
mod order; // Which job runs when.
mod outages;
mod outcomes; // What a run can end as.
mod ownership; // Nobody sees what another owns, on any path there is.
mod pooler; // PgBouncer between the product and PostgreSQL.
mod real_cli; // The real Claude CLI against the simulator.
mod receivers;
mod requests; // What a request may say, and that nothing of it is overheard.
mod retention; // What ended jobs have left is removed.
mod retries; // What passes is tried again, what doesn't isn't.
mod sandbox;
mod sessions; // Sessions: made, changed, read, deleted.
mod spend; // Only the gateway is believed about money and models.
mod start; // How programs start, and on what they depend.
mod survivors; // A run that does everything to live on doesn't.
mod tickets; // What wakes the slots may be lost, damaged or too much.
mod upgrade; // Tables that a newer release has changed.
mod upstream; // The Messages API fails, and no job does.
mod usage; // What was spent, exact against the attempts.
mod webhooks; // Events leave the service, signed, at least once.
