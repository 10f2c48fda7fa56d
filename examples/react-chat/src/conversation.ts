import type { UIMessage } from "ai";

/** A chat as the gateway has it. */
export type Conversation = {
  messages: UIMessage[];
  /** Where in the session's log this is. */
  offset: number;
  /** Whether a turn has not ended. What is being said is not in `messages`: the stream has it. */
  active: boolean;
};

/** Whether there is a stream to join. An answer that waits for a person's own is in `messages`, and nothing streams. */
export function isStreaming({ active, messages }: Conversation): boolean {
  return active && messages.at(-1)?.role !== "assistant";
}

export async function load(id: string): Promise<Conversation> {
  const response = await fetch(`/api/chat/${id}`);
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

/** Stop what is being said, whichever device asked for it. Hanging up stops nothing. */
export async function stopTurn(id: string): Promise<void> {
  const response = await fetch(`/api/chat/${id}/stop`, { method: "POST" });
  if (!response.ok) throw new Error(await response.text());
}
