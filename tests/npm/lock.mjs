// `npm run lock`: package-lock.json without any address, so that it serves whichever registry npm is set up for.
import { readFileSync, writeFileSync } from 'node:fs'

const lock = JSON.parse(readFileSync('package-lock.json', 'utf8'))
for (const entry of Object.values(lock.packages)) {
  delete entry.resolved
  delete entry.funding
}
const text = JSON.stringify(lock, null, 2) + '\n'
if (text.includes('://')) throw new Error('package-lock.json still holds an address')
writeFileSync('package-lock.json', text)
