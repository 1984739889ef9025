// Lists the blueprints and seeds of a live mesh, then follows its runs for a few messages:
//   npx tsx src/example.ts runs/latest/addresses.json [MESSAGES]
import { Code, ConnectError, Mesh, readAddresses } from "./index.js";
import { ChangeType } from "./gen/esper/common/v1/common_pb.js";
import { SeedState } from "./gen/esper/kasmina/v1/seed_pb.js";
import { RunState } from "./gen/esper/tolaria/v1/run_pb.js";

async function main(path: string, messages: number): Promise<void> {
  const mesh = new Mesh(readAddresses(path));

  const library = await mesh.blueprints.listBlueprints({ pageSize: 1000 }, { timeoutMs: 10_000 });
  for (const blueprint of library.blueprints) {
    console.log(`blueprint ${blueprint.name} ${blueprint.spec?.family ?? ""}`);
  }

  const found = await mesh.seeds.listSeeds({ run: "runs/-", pageSize: 1000 }, { timeoutMs: 10_000 });
  for (const seed of found.seeds) {
    console.log(`seed ${seed.name} ${seed.slot} ${SeedState[seed.state]}`);
  }

  // The timeout is of the whole stream.
  for await (const update of mesh.training.watchRun({}, { timeoutMs: 60_000 })) {
    const change = ChangeType[update.change];
    const run = update.run;
    if (run === undefined) {
      console.log(`watch ${change}`); // a bookmark: all that exists has been told
    } else {
      console.log(`watch ${change} ${run.name} ${RunState[run.state]} epoch ${run.epoch}/${run.epochs}`);
    }
    if (--messages === 0) {
      break;
    }
  }
}

const [path, messages = "5"] = process.argv.slice(2);
if (path === undefined) {
  console.error("usage: example.ts ADDRESSES.JSON [MESSAGES]");
  process.exit(2);
}
try {
  await main(path, Number(messages));
  process.exit(0); // connections are kept alive for later calls; there are none
} catch (error) {
  const told = ConnectError.from(error);
  console.error(`example.ts: ${Code[told.code]}: ${told.rawMessage}`);
  process.exit(1);
}
