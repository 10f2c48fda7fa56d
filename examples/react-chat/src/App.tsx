import { generateId } from "ai";
import { useEffect, useState } from "react";
import { Chat } from "./Chat";
import { load, type Conversation } from "./conversation";

/** The chat's id stands in the address, so that a reload, or another device, opens the same chat. */
function chatOfAddress(): string {
  const url = new URL(location.href);
  const id = url.searchParams.get("chat") ?? generateId();
  url.searchParams.set("chat", id);
  history.replaceState(null, "", url);
  return id;
}

export function App() {
  const [id, setId] = useState(chatOfAddress);
  const [loaded, setLoaded] = useState<{ id: string; conversation: Conversation }>();
  const [problem, setProblem] = useState("");

  useEffect(() => {
    const moved = () => setId(chatOfAddress());
    addEventListener("popstate", moved);
    return () => removeEventListener("popstate", moved);
  }, []);

  useEffect(() => {
    let over = false;
    setProblem("");
    load(id).then(
      (conversation) => over || setLoaded({ id, conversation }),
      (error: Error) => over || setProblem(error.message),
    );
    return () => {
      over = true;
    };
  }, [id]);

  function begin() {
    history.pushState(null, "", location.pathname);
    setId(chatOfAddress());
  }

  return (
    <div className="app">
      <header>
        <h1>Chat</h1>
        <CopyLink key={id} />
        <button onClick={begin}>New chat</button>
      </header>
      {problem && <p className="problem" role="alert">The chat cannot be loaded: {problem}</p>}
      {loaded?.id === id && <Chat key={id} id={id} conversation={loaded.conversation} />}
    </div>
  );
}

function CopyLink() {
  const [copied, setCopied] = useState(false);
  return (
    <button
      title="Open it on another device"
      onClick={() => navigator.clipboard.writeText(location.href).then(() => setCopied(true))}
    >
      {copied ? "Copied" : "Copy link"}
    </button>
  );
}
