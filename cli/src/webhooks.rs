//! `webhooks`: endpoints and deliveries of the key, and a receiver for development.

mod listen;

use serde_json::{Value, json};
use shared::env::Vars;

use crate::client::Client;
use crate::failure::Failure;
use crate::{output, show};

const ENDPOINTS: &str = "/api/v1/webhooks/endpoints";
const DELIVERIES: &str = "/api/v1/webhooks/deliveries";

/// What to do.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List endpoints, or create, test, enable or delete one
    Endpoints {
        /// Create an endpoint for this URL and print its secret, which is shown only once
        #[arg(long, value_name = "URL", conflicts_with_all = ["test", "enable", "delete"])]
        create: Option<String>,
        /// With --create: only these events, comma-separated, such as job.completed,job.failed
        #[arg(long, value_delimiter = ',', requires = "create")]
        events: Vec<String>,
        /// Send a test event to the endpoint with this id
        #[arg(long, value_name = "ID", conflicts_with_all = ["enable", "delete"])]
        test: Option<String>,
        /// Enable the endpoint with this id
        #[arg(long, value_name = "ID", conflicts_with = "delete")]
        enable: Option<String>,
        /// Delete the endpoint with this id
        #[arg(long, value_name = "ID")]
        delete: Option<String>,
        /// Print the response as JSON
        #[arg(long)]
        json: bool,
    },
    /// List deliveries, the newest first, or show one with its attempts
    Deliveries {
        /// Show the delivery with this id
        id: Option<String>,
        /// Only deliveries about this job
        #[arg(long)]
        job: Option<String>,
        /// Only this status: pending, succeeded, failed, cancelled
        #[arg(long)]
        status: Option<String>,
        /// Maximum number of deliveries, 1 to 100
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// Print the response as JSON
        #[arg(long)]
        json: bool,
    },
    /// Send a delivery once more
    Resend {
        /// The delivery's id
        id: String,
    },
    /// Print the key's secret for jobs with a `webhook_url`: a new one, which is shown only once
    Secret {
        /// How long the previous secret signs beside the new one, in seconds
        #[arg(long, default_value_t = 86_400)]
        grace: u32,
    },
    /// Receive webhooks on this machine, verify them and print them; for development
    Listen(listen::Arguments),
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::Endpoints {
            create,
            events,
            test,
            enable,
            delete,
            json,
        } => {
            let client = Client::from_vars(vars)?;
            if let Some(url) = create {
                let body = json!({ "url": url, "event_types": events });
                let made = client.post(ENDPOINTS, &body).await?;
                return print(&made["data"], json, endpoint);
            }
            if let Some(id) = test {
                let path = format!("{ENDPOINTS}/{}/test", plain(&id));
                let sent = client.post(&path, &json!({})).await?;
                return print(&sent["data"], json, delivery);
            }
            if let Some(id) = enable {
                let path = format!("{ENDPOINTS}/{}", plain(&id));
                let changed = client.patch(&path, &json!({ "status": "enabled" })).await?;
                return print(&changed["data"], json, endpoint);
            }
            if let Some(id) = delete {
                return client.delete(&format!("{ENDPOINTS}/{}", plain(&id))).await;
            }
            list(&client.get(ENDPOINTS, &[]).await?, json, endpoint)
        }
        Command::Deliveries {
            id,
            job,
            status,
            limit,
            json,
        } => {
            let client = Client::from_vars(vars)?;
            if let Some(id) = id {
                let path = format!("{DELIVERIES}/{}", plain(&id));
                let shown = client.get(&path, &[]).await?;
                return print(&shown["data"], json, with_attempts);
            }
            let mut query = vec![("limit", limit.to_string())];
            query.extend(job.map(|job| ("job_id", job)));
            query.extend(status.map(|status| ("status", status)));
            list(&client.get(DELIVERIES, &query).await?, json, delivery)
        }
        Command::Resend { id } => {
            let client = Client::from_vars(vars)?;
            let path = format!("{DELIVERIES}/{}/resend", plain(&id));
            let again = client.post(&path, &json!({})).await?;
            print(&again["data"], false, delivery)
        }
        Command::Secret { grace } => {
            let client = Client::from_vars(vars)?;
            let body = json!({ "grace_seconds": grace });
            let made = client.post("/api/v1/webhooks/secret/rotate", &body).await?;
            output::result(made["data"]["secret"].as_str().unwrap_or("?"))
        }
        Command::Listen(arguments) => listen::run(vars, arguments).await,
    }
}

/// An id, without what could change the path.
fn plain(id: &str) -> String {
    id.chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '_')
        .collect()
}

fn print(value: &Value, as_json: bool, line: impl Fn(&Value) -> String) -> Result<(), Failure> {
    if as_json {
        output::json(value)
    } else {
        output::result(line(value))
    }
}

fn list(page: &Value, as_json: bool, line: impl Fn(&Value) -> String) -> Result<(), Failure> {
    if as_json {
        return output::json(page);
    }
    for one in page["data"].as_array().into_iter().flatten() {
        output::result(line(one))?;
    }
    if page["pagination"]["has_more"] == true {
        output::note("there are more");
    }
    Ok(())
}

fn word<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or("-")
}

fn endpoint(endpoint: &Value) -> String {
    let types = endpoint["event_types"].as_array().into_iter().flatten();
    let types: Vec<&str> = types.filter_map(Value::as_str).collect();
    let mut line = format!(
        "{}  {:<8}  {}  {}",
        word(endpoint, "id"),
        word(endpoint, "status"),
        word(endpoint, "url"),
        if types.is_empty() {
            "all events".to_owned()
        } else {
            types.join(",")
        }
    );
    if let Some(reason) = endpoint["disabled_reason"].as_str() {
        line = format!("{line}  ({reason})");
    }
    if let Some(secret) = endpoint["secret"].as_str() {
        line = format!("{line}\n{secret}");
    }
    line
}

fn delivery(delivery: &Value) -> String {
    format!(
        "{}  {:<9}  {:<13}  {} attempts  {}  {}",
        word(delivery, "id"),
        word(delivery, "status"),
        word(delivery, "event_type"),
        delivery["attempt_count"].as_i64().unwrap_or(0),
        delivery["last_error_class"]
            .as_str()
            .or(delivery["job_id"].as_str())
            .unwrap_or("-"),
        show::short(word(delivery, "url")),
    )
}

fn with_attempts(shown: &Value) -> String {
    let mut lines = vec![delivery(shown)];
    for attempt in shown["attempts"].as_array().into_iter().flatten() {
        lines.push(format!(
            "  {}  {}  {} ms  {} {}  {}",
            attempt["number"],
            word(attempt, "started_at"),
            attempt["duration_ms"],
            attempt["status_code"]
                .as_i64()
                .map_or_else(|| "-".to_owned(), |status| status.to_string()),
            word(attempt, "error_class"),
            show::short(word(attempt, "response_snippet")),
        ));
    }
    lines.join("\n")
}
