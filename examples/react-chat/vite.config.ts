import react from "@vitejs/plugin-react";
import { defineConfig, type ProxyOptions } from "vite";

// In production a reverse proxy does the same: the page and the gateway have one origin.
const gateway: ProxyOptions = {
  target: process.env.AGENTRUN_GATEWAY ?? "http://127.0.0.1:8080",
  configure: (proxy) => {
    // Vite's proxy keeps an answer open whose source has broken off, and the page would wait for ever.
    proxy.on("proxyRes", (upstream, _, response) => {
      upstream.on("close", () => upstream.complete || response.destroy());
    });
  },
};

export default defineConfig({
  plugins: [react()],
  server: { proxy: { "/api": gateway, "/v1": gateway } },
});
