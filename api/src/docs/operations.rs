//! What each method of each path does, for the document. The table of routes has the paths, scopes and query parameters;
//! what is missing here for one of them fails a test.

use http::Method;

/// What an answer holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content {
    /// `{"data": …, "meta": …}`.
    Data(&'static str),
    /// `{"data": [ … ], "meta": …}`, with a `pagination` of this schema.
    List(&'static str, &'static str),
    /// `{"data": [ … ], "meta": …}`.
    All(&'static str),
    /// The schema alone.
    Bare(&'static str),
    /// Bytes of any type.
    Bytes,
    /// Bytes, and text for people.
    Text,
    /// Server-sent events.
    Events,
    /// Events, as a stream or as a list.
    EventsOrList,
    /// A result as JSON, or its text.
    ResultOrText,
    /// The ledger as JSON or CSV.
    Ledger,
    /// Nothing.
    Empty,
}

/// What a request holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Body {
    /// None.
    None,
    /// JSON of this schema.
    Json(&'static str),
    /// JSON of this schema, or no body.
    Optional(&'static str),
    /// A form with a file.
    File,
}

/// One method of one path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    /// Its name for generators of clients.
    pub(super) id: &'static str,
    /// What it does.
    pub(super) summary: &'static str,
    pub(super) body: Body,
    /// What goes well.
    pub(super) answers: &'static [(u16, Content)],
    /// Problems beside those that every operation of its kind can have.
    pub(super) problems: &'static [u16],
}

macro_rules! operations {
    ($($method:ident $path:literal $id:literal $summary:literal $body:expr, [$($status:literal $content:expr),*] [$($problem:literal)*])*) => {
        /// What the method of the path does; `None` if nobody has said.
        pub(super) fn find(method: &Method, path: &str) -> Option<Operation> {
            $(if *method == Method::$method && path == $path {
                return Some(Operation {
                    id: $id,
                    summary: $summary,
                    body: $body,
                    answers: &[$(($status, $content)),*],
                    problems: &[$($problem),*],
                });
            })*
            None
        }
    };
}

use Body::{File, Json, None as NoBody, Optional};
use Content::{All, Bare, Bytes, Data, Empty, Events, EventsOrList, Ledger, List, ResultOrText, Text};

/// The `pagination` of lists that are read by cursor, and by page.
const CURSOR: &str = "Pagination";
const PAGES: &str = "PageNumbers";

// To add one: method, path as in `routes::named`, name, sentence, body, [status content, …], [further problems].
operations! {
    GET "/api/v1/jobs" "listJobs" "List the caller's jobs, newest first" NoBody, [200 List("Job", CURSOR)] [400]
    POST "/api/v1/jobs" "submitJob" "Submit a job" Json("JobCreate"), [202 Data("Job"), 200 Data("Job")] [400 404 409]
    GET "/api/v1/jobs/{id}" "getJob" "Read a job, or wait for its next change" NoBody, [200 Data("Job"), 304 Empty] [400]
    DELETE "/api/v1/jobs/{id}" "deleteJobData" "Delete the data of a job that has ended" NoBody, [204 Empty] [409]
    GET "/api/v1/jobs/{id}/attempts" "listAttempts" "List how often the job was tried" NoBody, [200 All("Attempt")] []
    GET "/api/v1/jobs/{id}/events" "listEvents" "Read the events, as a stream or a list" NoBody, [200 EventsOrList, 204 Empty] [400 406 410]
    GET "/api/v1/jobs/{id}/stream" "streamEvents" "Follow the events" NoBody, [200 Events, 204 Empty] [400 410]
    GET "/api/v1/jobs/{id}/result" "getResult" "Read the result alone" NoBody, [200 ResultOrText] [409 410]
    POST "/api/v1/jobs/{id}/cancel" "cancelJob" "Cancel a job" Optional("CancelRequest"), [200 Data("Job"), 202 Data("Job")] [409]
    GET "/api/v1/jobs/{id}/files" "listJobFiles" "List the workspace in which the job runs" NoBody, [200 Bare("FileList")] [400 410]
    GET "/api/v1/jobs/{id}/files/{path}" "getJobFile" "Read a file of the job's workspace" NoBody, [200 Bytes, 206 Bytes, 304 Empty] [400 410 416]
    GET "/api/v1/jobs/{id}/archive" "getJobArchive" "Read the job's workspace as .tar.gz" NoBody, [200 Bytes] [409 410]
    GET "/api/v1/sessions" "listSessions" "List the caller's sessions, most recently used first" NoBody, [200 List("Session", PAGES)] []
    POST "/api/v1/sessions" "createSession" "Create a session, or replace the settings of the one of this name" Json("SessionCreate"), [201 Data("Session")] [400 412]
    GET "/api/v1/sessions/{name}" "getSession" "Read a session" NoBody, [200 Data("Session")] []
    PATCH "/api/v1/sessions/{name}" "changeSession" "Change the settings of a session" Json("SessionPatch"), [200 Data("Session")] [409 412]
    DELETE "/api/v1/sessions/{name}" "deleteSession" "Delete a session and its workspace; its jobs are cancelled and stay readable" NoBody, [204 Empty] [409 412]
    POST "/api/v1/sessions/{name}/repo" "setWorkingDirectory" "Let the session work in another directory" Json("RepoRequest"), [200 Data("Session")] [400 409]
    GET "/api/v1/sessions/{name}/history" "getHistory" "Read the newest messages of the conversation, oldest first" NoBody, [200 Bare("History")] []
    GET "/api/v1/sessions/{name}/jobs/{id}" "getSessionJob" "Read a job of the session" NoBody, [200 Data("Job"), 304 Empty] [400]
    POST "/api/v1/sessions/{name}/jobs/{id}/cancel" "cancelSessionJob" "Cancel a job of the session" Optional("CancelRequest"), [200 Data("Cancelling")] [409]
    POST "/api/v1/sessions/{name}/chat" "chat" "Send a message and wait for the answer" Json("ChatRequest"), [200 Data("ChatAnswer"), 202 Data("Job")] [400 409 502 504]
    POST "/api/v1/sessions/{name}/chat/stream" "chatStream" "Send a message and follow the answer" Json("ChatRequest"), [200 Events] [400 406 409 502 504]
    GET "/api/v1/templates" "listTemplates" "List the templates" NoBody, [200 Data("Templates")] []
    GET "/api/v1/templates/{name}" "getTemplate" "Read a template" NoBody, [200 Data("Template")] []
    POST "/api/v1/templates/reload" "reloadTemplates" "Read the file of templates again" NoBody, [200 Data("Reloaded")] [415]
    POST "/api/v1/tokens/count" "countTokens" "Estimate the tokens of a text" Json("CountRequest"), [200 Data("TokenCount")] []
    GET "/api/v1/sessions/{name}/jobs" "listSessionJobs" "List the jobs of a session" NoBody, [200 List("Job", CURSOR)] [400]
    POST "/api/v1/sessions/{name}/jobs" "submitSessionJob" "Submit a job in a session" Json("JobCreate"), [202 Data("Job"), 200 Data("Job")] [400 409]
    GET "/api/v1/sessions/{name}/files" "listSessionFiles" "List the session's workspace" NoBody, [200 Bare("FileList")] [400]
    POST "/api/v1/sessions/{name}/files" "uploadFile" "Store a file in the session's workspace" File, [201 Data("StoredFile")] [400]
    GET "/api/v1/sessions/{name}/files/{path}" "getSessionFile" "Read a file of the session's workspace" NoBody, [200 Bytes, 206 Bytes, 304 Empty] [400 416]
    DELETE "/api/v1/sessions/{name}/files/{path}" "deleteFile" "Remove a file, a link or an empty directory" NoBody, [204 Empty] [400]
    GET "/api/v1/keys" "listKeys" "List keys" NoBody, [200 List("Key", CURSOR)] [400]
    POST "/api/v1/keys" "createKey" "Create a key; its secret is shown once" Json("KeyCreate"), [201 Data("Key")] [409]
    GET "/api/v1/keys/me" "getOwnKey" "Read the caller's own key" NoBody, [200 Data("Key")] []
    GET "/api/v1/keys/{id}" "getKey" "Read a key" NoBody, [200 Data("Key")] []
    PATCH "/api/v1/keys/{id}" "changeKey" "Change a key" Json("KeyPatch"), [200 Data("Key")] [409 412]
    DELETE "/api/v1/keys/{id}" "deleteKey" "Delete a key that is no longer valid" NoBody, [204 Empty] [409]
    POST "/api/v1/keys/{id}/rotate" "rotateKey" "Issue a new secret" Optional("RotateRequest"), [200 Data("Key")] [409 412]
    POST "/api/v1/keys/{id}/revoke" "revokeKey" "Revoke a key" Optional("RevokeRequest"), [200 Data("Key")] [409]
    GET "/api/v1/budgets" "listBudgets" "List budgets" NoBody, [200 List("Budget", CURSOR)] [400]
    GET "/api/v1/budgets/{scope}/{id}" "getBudget" "Read a budget" NoBody, [200 Data("Budget")] []
    PUT "/api/v1/budgets/{scope}/{id}" "putBudget" "Set a budget as a whole" Json("BudgetPut"), [200 Data("Budget")] [400 409 412]
    DELETE "/api/v1/budgets/{scope}/{id}" "deleteBudget" "Remove a budget" NoBody, [204 Empty] [409 412]
    POST "/api/v1/budgets/{scope}/{id}/adjust" "adjustBudget" "Correct what was spent" Json("Adjustment"), [200 Data("Budget")] [400 409]
    GET "/api/v1/usage" "getUsage" "Read what a key has done and spent" NoBody, [200 Bare("UsageAnswer")] [404]
    GET "/api/v1/usage/ledger" "getLedger" "Read the ledger, or sums of it" NoBody, [200 Ledger] [400 404 406]
    GET "/api/v1/audit" "listAudit" "Read the messages of sessions, or who changed what" NoBody, [200 Bare("AuditAnswer")] [400 404]
    GET "/api/v1/webhooks/secret" "getWebhookSecret" "Read which secret signs the events of jobs" NoBody, [200 Data("WebhookSecret")] [409]
    POST "/api/v1/webhooks/secret/rotate" "rotateWebhookSecret" "Sign with a new secret" Optional("KeySecretRotate"), [200 Data("WebhookSecret")] [409 412]
    GET "/api/v1/webhooks/endpoints" "listEndpoints" "List endpoints" NoBody, [200 List("Endpoint", CURSOR)] [400 409]
    POST "/api/v1/webhooks/endpoints" "createEndpoint" "Create an endpoint" Json("EndpointCreate"), [201 Data("Endpoint")] [409]
    GET "/api/v1/webhooks/endpoints/{id}" "getEndpoint" "Read an endpoint" NoBody, [200 Data("Endpoint")] [409]
    PATCH "/api/v1/webhooks/endpoints/{id}" "changeEndpoint" "Change an endpoint" Json("EndpointPatch"), [200 Data("Endpoint")] [409 412]
    DELETE "/api/v1/webhooks/endpoints/{id}" "deleteEndpoint" "Delete an endpoint" NoBody, [204 Empty] [409]
    POST "/api/v1/webhooks/endpoints/{id}/secret/rotate" "rotateEndpointSecret" "Sign with a new secret" Optional("SecretRotate"), [200 Data("Endpoint")] [409 412]
    POST "/api/v1/webhooks/endpoints/{id}/test" "testEndpoint" "Send a test event" NoBody, [202 Data("Delivery")] [409]
    POST "/api/v1/webhooks/endpoints/{id}/recover" "recoverEndpoint" "Send what failed in a time once more" Json("RecoverRequest"), [202 Data("Recovered")] [409]
    GET "/api/v1/webhooks/deliveries" "listDeliveries" "List deliveries" NoBody, [200 List("Delivery", CURSOR)] [400]
    GET "/api/v1/webhooks/deliveries/{id}" "getDelivery" "Read a delivery" NoBody, [200 Data("Delivery")] []
    POST "/api/v1/webhooks/deliveries/{id}/resend" "resendDelivery" "Send a delivery once more" Optional("Nothing"), [202 Data("Delivery")] [409]
    POST "/api/v1/queue/resume" "resumeQueue" "Lift the pauses that the Messages API caused" NoBody, [200 Data("Resumed")] []
    GET "/api/v1/health" "getHealth" "Read how things are" NoBody, [200 Bare("Health")] []
    GET "/livez" "getLivez" "Whether the process runs" NoBody, [200 Text] []
    GET "/readyz" "getReadyz" "Whether requests can be served" NoBody, [200 Bare("Ready")] [503]
    GET "/openapi.json" "getOpenApi" "This document" NoBody, [200 Bare("Document")] [404]
}
